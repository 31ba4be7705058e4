import pytest

from worker.config import Config, ConfigError


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    config = Config.from_env({})
    assert (config.comfyui_port, config.boot_timeout_s, config.job_timeout_s) == (8188, 1800, 3600)
    assert (config.interrupt_grace_s, config.result_limit_bytes, config.log_level) == (10, None, "INFO")
    assert (config.allow_url_inputs, config.url_input_limit_bytes, config.url_input_timeout_s) == (
        False,
        100_000_000,
        60,
    )
    assert str(config.ramdisk_dir) == "/dev/shm/comfyui"


def test_an_empty_value_is_as_good_as_none() -> None:
    names = "RAMDISK_DIR COMFYUI_PORT BOOT_TIMEOUT_S JOB_TIMEOUT_S INTERRUPT_GRACE_S RESULT_LIMIT_MB LOG_LEVEL"
    names += " ALLOW_URL_INPUTS URL_INPUT_LIMIT_MB URL_INPUT_TIMEOUT_S"
    names += " RESTART_COMFYUI"
    assert Config.from_env(dict.fromkeys(names.split(), "")) == Config.from_env({})


def test_comfyui_is_restarted_only_where_it_is_asked_for() -> None:
    assert not Config.from_env({}).restart_comfyui_each_job
    assert Config.from_env({"RESTART_COMFYUI": "each-job"}).restart_comfyui_each_job


def test_values_are_read_with_their_units() -> None:
    config = Config.from_env({"RESULT_LIMIT_MB": "1.5", "JOB_TIMEOUT_S": " 90 ", "LOG_LEVEL": "debug"})
    urls = Config.from_env({"ALLOW_URL_INPUTS": "1", "URL_INPUT_LIMIT_MB": "2.5", "URL_INPUT_TIMEOUT_S": "7"})
    assert (urls.allow_url_inputs, urls.url_input_limit_bytes, urls.url_input_timeout_s) == (True, 2_500_000, 7)
    assert (config.result_limit_bytes, config.job_timeout_s, config.log_level) == (1_500_000, 90, "DEBUG")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JOB_TIMEOUT_S", "soon"),
        ("JOB_TIMEOUT_S", "0"),
        ("JOB_TIMEOUT_S", "nan"),
        ("COMFYUI_PORT", "70000"),
        ("RESULT_LIMIT_MB", "-1"),
        ("INTERRUPT_GRACE_S", "inf"),
        ("LOG_LEVEL", "CHATTY"),
        ("ALLOW_URL_INPUTS", "yes"),
        ("URL_INPUT_LIMIT_MB", "0"),
        ("URL_INPUT_TIMEOUT_S", "never"),
        ("RESTART_COMFYUI", "1"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Config.from_env({name: value})
