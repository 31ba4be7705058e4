"""Makes a checkpoint of random weights that ComfyUI takes for Stable Diffusion 1.5, and really samples with.

    cd COMFYUI_DIR && COMFYUI_PYTHON tiny_checkpoint.py OUT

ComfyUI reads a model's configuration off the shapes in the file: a UNet of one level with 320 channels (13.6 M
parameters), the text encoder of CLIP-L, a TAESD decoder; 280 MB. 8 steps at 64x64 take a second on a CPU. Used with
0.18.1 and 0.3.64.
"""

import sys
from pathlib import Path

OUT = Path(sys.argv[1]).absolute()
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, str(Path.cwd()))

import comfy.options  # noqa: E402 - ComfyUI reads the command line when it is imported

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1],
    "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -2,
    "context_dim": 768,
    "legacy": False,
    "use_linear_in_transformer": False,
    "use_checkpoint": False,
}


def filled(shapes: dict[str, torch.Tensor], prefix: str, gain: float, left_out: tuple[str, ...] = ()) -> dict:
    """Weights of the given shapes, such that a signal neither dies nor explodes on its way through them."""
    weights = {}
    for name, tensor in shapes.items():
        if any(part in name for part in left_out):
            continue
        if tensor.dim() >= 2:
            scale = 0.02 if "embedding" in name else gain / tensor[0].numel() ** 0.5
            made = torch.randn(tensor.shape) * scale
        else:  # norms pass on what they get
            made = torch.ones(tensor.shape) if name.endswith("weight") else torch.zeros(tensor.shape)
        weights[prefix + name] = made.half().contiguous()
    return weights


def main() -> None:
    torch.manual_seed(7)
    how = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
    clip = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    unused = ("text_projection", "logit_scale", "position_ids")
    weights = {
        **filled(UNetModel(**UNET, **how).state_dict(), "model.diffusion_model.", 0.8),
        **filled(clip.transformer.state_dict(), "cond_stage_model.transformer.", 0.7, unused),
        **filled(TAESD().state_dict(), "first_stage_model.", 1.0, ("vae_scale", "vae_shift")),
        "first_stage_model.vae_scale": torch.tensor(1.0).half(),
        "first_stage_model.vae_shift": torch.tensor(0.0).half(),
    }
    last = max((name for name in weights if "taesd_decoder" in name and name.endswith(".bias")), key=_layer)
    weights[last] += 0.5  # grey in the middle
    weights[last.replace("bias", "weight")] *= 0.3
    save_file(weights, OUT)


def _layer(name: str) -> int:
    return int(name.split(".")[2])


if __name__ == "__main__":
    main()
