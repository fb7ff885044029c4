"""Servers that a config names: their address, and the key that is sent to them. Imports no torch."""

import os
from urllib.parse import urlsplit

from dppo_cli.errors import ConfigError


def check_address(key: str, url: object, example: str) -> None:
    """Raise ConfigError unless `url`, the value of `key`, is the address of a server, without a password in it."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of a port, or of brackets
        right = False
    if not right:
        raise ConfigError(f"{key}={url} is no address; write {example}")
    if parts.username or parts.password:
        section = key.partition(".")[0]
        raise ConfigError(f"{key} holds a password; leave it out, and name a variable with {section}.api_key_env")


def secret_of(key: str, variable: str) -> str:
    """The secret in the environment variable that `key` names. Raises ConfigError, without it, if it cannot be sent."""
    if not variable.isidentifier():
        raise ConfigError(f"{key} is the name of an environment variable that holds the key, not the key itself")
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise ConfigError(f"{key}={variable}, but the environment has no such variable; export {variable}=...")
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError(f"the secret in {variable} ({key}) has characters that cannot be sent")
    return secret
