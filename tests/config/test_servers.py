"""Addresses of servers, and keys that are sent to them."""

import pytest

from dppo_cli.config.servers import check_address, secret_of
from dppo_cli.errors import ConfigError

KEY = "rollout.api_key_env"


@pytest.mark.parametrize("url", ["http://localhost:8000", "https://node7/v1", "http://[::1]:80", "http://10.0.0.1"])
def test_addresses(url) -> None:
    check_address("reward.url", url, "http://host")


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "http://", "ftp://host", "http://host:abc", "http://host:99999", "http://[::1", 8000, None],
)
def test_what_is_no_address(url) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address("reward.url", url, "http://host:port/v1")
    assert str(caught.value) == f"reward.url={url} is no address; write http://host:port/v1"


def test_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        check_address("reward.url", "http://me:sesame@host", "http://host")
    assert str(caught.value) == "reward.url holds a password; leave it out, and name a variable with reward.api_key_env"


def test_a_line_break_after_a_secret_is_none_of_it(monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sesame\n")
    assert secret_of(KEY, "TEST_KEY") == "sesame"


@pytest.mark.parametrize("secret", ["ses\name", "sesäme"])
def test_secrets_that_cannot_be_sent_are_not_shown(monkeypatch, secret) -> None:
    """The library that sends them would show them."""
    monkeypatch.setenv("TEST_KEY", secret)
    with pytest.raises(ConfigError, match=r"the secret in TEST_KEY \(rollout.api_key_env\) has characters") as caught:
        secret_of(KEY, "TEST_KEY")
    assert secret not in str(caught.value)


def test_no_secret(monkeypatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"rollout.api_key_env=TEST_KEY, but the environment has no such variable"):
        secret_of(KEY, "TEST_KEY")


def test_the_secret_itself_in_place_of_its_name_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        secret_of(KEY, "sk-7731-abc")
    assert "sk-7731" not in str(caught.value) and "the name of an environment variable" in str(caught.value)
