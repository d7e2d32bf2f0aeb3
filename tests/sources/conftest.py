from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sources.hub_server import HubServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub that huggingface_hub talks to in this test, and no login."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    _forget_connections()
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        _forget_connections()


def _forget_connections() -> None:
    import huggingface_hub
    from huggingface_hub import utils

    forget = getattr(huggingface_hub, "close_session", None) or getattr(utils, "reset_sessions", None)
    if forget is not None:
        forget()
