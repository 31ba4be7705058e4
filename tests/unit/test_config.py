import re

import pytest

from worker.config import Config, ConfigError

BUCKET = {
    "BUCKET_ENDPOINT_URL": "https://s3.example.com",
    "BUCKET_ACCESS_KEY_ID": "key",
    "BUCKET_SECRET_ACCESS_KEY": "hidden",
    "BUCKET_NAME": "results",
}


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    config = Config.from_env({})
    assert (config.comfyui_port, config.boot_timeout_s, config.job_timeout_s) == (8188, 1800, 3600)
    assert (config.interrupt_grace_s, config.result_limit_bytes, config.log_level) == (10, None, "INFO")
    assert (config.allow_url_inputs, config.url_input_limit_bytes, config.url_input_timeout_s) == (
        False,
        100_000_000,
        60,
    )
    assert (str(config.ramdisk_dir), config.bucket) == ("/dev/shm/comfyui", None)


def test_an_empty_value_is_as_good_as_none() -> None:
    names = "RAMDISK_DIR COMFYUI_PORT BOOT_TIMEOUT_S JOB_TIMEOUT_S INTERRUPT_GRACE_S RESULT_LIMIT_MB LOG_LEVEL"
    names += " ALLOW_URL_INPUTS URL_INPUT_LIMIT_MB URL_INPUT_TIMEOUT_S"
    names += " RESTART_COMFYUI BUCKET_ALWAYS BUCKET_REGION"
    assert Config.from_env(dict.fromkeys([*names.split(), *BUCKET], "")) == Config.from_env({})


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


# --- the bucket ---


def test_a_bucket_needs_all_four_settings_or_none() -> None:
    bucket = Config.from_env({**BUCKET, "BUCKET_ALWAYS": "1"}).bucket
    assert bucket is not None
    assert (bucket.name, bucket.always, bucket.signing_region) == ("results", True, "us-east-1")
    assert "hidden" not in repr(bucket)
    for name in BUCKET:
        with pytest.raises(ConfigError, match=f"; set {name} too") as caught:
            Config.from_env({key: value for key, value in BUCKET.items() if key != name})
        assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"; set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, .* too"):
        Config.from_env({"BUCKET_ALWAYS": "1"})
    with pytest.raises(ConfigError, match="BUCKET_ALWAYS is 'yes'; use 0 or 1"):
        Config.from_env({**BUCKET, "BUCKET_ALWAYS": "yes"})


@pytest.mark.parametrize(
    "url",
    [
        *("s3.example.com", "ftp://example.com", "https://", "https://k:hidden@example.com"),
        *("https://[bad", "https://example.com:hidden", "https://example.com:0"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="BUCKET_ENDPOINT_URL") as caught:
        Config.from_env({**BUCKET, "BUCKET_ENDPOINT_URL": url})
    assert not re.search("hidden|ftp", str(caught.value))


@pytest.mark.parametrize(
    ("endpoint", "region", "service"),
    [
        ("https://s3.eu-west-1.amazonaws.com", "eu-west-1", "https://s3.eu-west-1.amazonaws.com"),
        ("https://results.s3.eu-west-1.amazonaws.com", "eu-west-1", "https://s3.eu-west-1.amazonaws.com"),
        ("https://s3.amazonaws.com/", "us-east-1", "https://s3.amazonaws.com"),
        ("https://s3.us-west-004.backblazeb2.com", "us-west-004", "https://s3.us-west-004.backblazeb2.com"),
        ("https://s3api-eu-ro-1.runpod.io/", "eu-ro-1", "https://s3api-eu-ro-1.runpod.io"),
        ("https://id.r2.cloudflarestorage.com/results", "us-east-1", "https://id.r2.cloudflarestorage.com"),
        ("http://127.0.0.1:9000", "us-east-1", "http://127.0.0.1:9000"),
        ("https://s3.my-company.example.com", "us-east-1", "https://s3.my-company.example.com"),
    ],
)
def test_region_and_service_are_read_from_the_endpoint(endpoint: str, region: str, service: str) -> None:
    bucket = Config.from_env({**BUCKET, "BUCKET_ENDPOINT_URL": endpoint}).bucket
    assert bucket is not None
    assert (bucket.signing_region, bucket.service_url) == (region, service)
    other = Config.from_env({**BUCKET, "BUCKET_ENDPOINT_URL": endpoint, "BUCKET_REGION": "mars"}).bucket
    assert other is not None
    assert other.signing_region == "mars"
