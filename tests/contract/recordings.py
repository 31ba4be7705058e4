"""Which recordings of real ComfyUI are replayed, and which are not and why: `python tests/contract/recordings.py`."""

from __future__ import annotations

from comfyui_client import CAPTURES

VERSIONS = ("0.18.1", "0.3.75", "0.3.64")

# One request each; the messages, the history, the answer and the job are compared. Where a name stands on the right,
# that recording's request is sent first.
REQUESTS: dict[str, str | None] = {
    "ok_empty_save": None,
    "ok_empty_save_batch3": None,
    "ok_load_scale_invert": None,
    "ok_load_scale_invert_cached": "ok_load_scale_invert",
    "ok_batch": None,
    "ok_stitch": "ok_batch",
    "ok_preview_image": None,
    "ok_save_image_websocket": None,
    "ok_save_image_websocket_featureflags": None,
    "ok_feature_flags_handshake": None,
    "ok_get_image_size_text": None,
    "ok_extra_data": None,
    "ok_meta_title": None,
    "ok_front_and_number": None,
    "ok_no_client_id": None,
    "ok_own_prompt_id": None,
    "ok_own_prompt_id_again": None,
    "ok_own_prompt_id_same_wf": "ok_own_prompt_id_again",
    "err_zero_byte_image": None,
    "err_text_file_as_image": None,
    "err_truncated_image": None,
    "err_alloc_too_much": None,
    "err_scale_alloc": None,
    "err_two_branches_one_fails": None,
    "err_then_ok": "err_two_branches_one_fails",
    "err_then_cached_ok": "err_then_ok",
    "err_again": "err_zero_byte_image",
    "err_then_ok_cached2": "err_zero_byte_image",
    "err_no_client_id": None,
}
# Each has a test of its own, which names it.
SCENARIOS = (
    "after_invalid",
    "cached_output_deleted",
    "cached_without_client_id",
    "connect_late",
    "free",
    "get_at_start",
    "history_list",
    "history_ops",
    "hostile",
    "input_changed_same_name",
    "interrupt_during_last_compute_node",
    "interrupt_empty_json",
    "interrupt_in_ksampler",
    "interrupt_no_body",
    "interrupt_not_json",
    "interrupt_other_prompt_id",
    "interrupt_prompt_id",
    "interrupt_while_idle_then_prompt",
    "invalid_prompts",
    "jobs_after_errors",
    "ksampler_previews_plain",
    "ksampler_previews_with_metadata",
    "queue_ops",
    "queue_order",
    "reconnect_old_closed_after",
    "reconnect_old_closed_before",
    "reconnect_old_left_open",
    "two_outputs_one_bad_history",
    "upload",
    "view",
    "ws_odd_client_messages",
    "ws_without_client_id",
)
NOT_USED = {"race_and_latency": "a table of measured times; it holds no request and no message"}


def recorded(version: str) -> set[str]:
    """The names of a version's recordings."""
    return {path.stem for path in (CAPTURES / version).glob("*.json")}


def used(version: str) -> set[str]:
    """Those of them that a test replays."""
    return recorded(version) & {*REQUESTS, *SCENARIOS}


def main() -> None:
    """Print the share that is used of each version, and the reason for every other file."""
    for version in VERSIONS:
        print(f"{version}: {len(used(version))} of {len(recorded(version))} recordings are replayed")
        for name in sorted(recorded(version) - used(version)):
            print(f"  not used: {name}: {NOT_USED.get(name, 'no reason is known')}")


if __name__ == "__main__":
    main()
