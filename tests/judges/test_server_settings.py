"""Settings of servers: what cannot work is refused in one line with its remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.utils.errors import ConfigError

SERVER = {"url": "http://127.0.0.1:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge": {"backend": "server"}}, 'judge.backend = "server" needs judge.server.url: set it'),
        (
            {"judge": {"backend": "server", "server": {"url": SERVER["url"]}}},
            "needs judge.server.model: set it",
        ),
        (
            {"rewriter": {"backend": "server"}},
            'rewriter.backend = "server" needs rewriter.server.url: set it',
        ),
        (
            {"judge": {"server": SERVER}},
            'judge.backend is "heuristic": set judge.backend = "server", or remove',
        ),
        (
            {"rewriter": {"server": SERVER}},
            'rewriter.backend is "none": set rewriter.backend = "server", or remove',
        ),
        ({"judge": {"server": {"url": "127.0.0.1:8000"}}}, "judge.server.url: .* is not a base URL"),
        ({"judge": {"server": {"url": "http:///v1"}}}, "is not a base URL"),
        ({"judge": {"server": {"url": "http://h/v1?key=1"}}}, "is not a base URL"),
        ({"judge": {"server": {"url": "http://h:port/v1"}}}, "not a URL"),
        ({"judge": {"server": {"url": "http://me:secret@h:port/v1"}}}, "not a URL"),
        ({"judge": {"server": {"url": "ftp://me:secret@h/v1"}}}, "keep the key out of the URL"),
        ({"judge": {"server": {"url": "http://me:secret@h/v1"}}}, "keep the key out of the URL"),
        ({"judge": {"server": {"url": "http://h/v1/chat/completions/"}}}, "leave out /chat/completions"),
        ({"judge": {"server": SERVER | {"extra_body": {"seed": 1}}}}, "extra_body.seed: set seed itself"),
        (
            {"judge": {"server": SERVER | {"extra_body": {"stream": True}}}},
            "extra_body.stream is not free: remove it",
        ),
        ({"judge": {"server": SERVER | {"omit": ["model"]}}}, "judge.server.omit"),
        ({"judge": {"server": SERVER | {"modle": "m"}}}, "did you mean 'model'"),
        ({"rewriter": {"server": SERVER | {"style": "direct"}}}, "unknown key 'rewriter.server.style'"),
    ],
)
def test_settings_in_conflict_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(message)) as caught:
        parse_config(values, "my.toml")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_good_settings_survive_a_round_trip() -> None:
    values = {
        "judge": {"backend": "server", "server": SERVER | {"url": "http://127.0.0.1:1/v1/", "omit": ["seed"]}}
    }
    cfg = parse_config(values, "my.toml")
    assert cfg.judge.server.url == SERVER["url"]
    assert RunConfig.model_validate_json(cfg.model_dump_json()) == cfg
