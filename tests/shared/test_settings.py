"""The configuration of a host: file, environment, flags; and what is said about a wrong one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shared.curve import check_endpoints
from shared.errors import SettingsError
from shared.keys import new_host_key, write_host_key
from shared.settings import (
    DraftSettings,
    GatewaySettings,
    Settings,
    changed_keys,
    default_run_dir,
    load_effective,
    load_settings,
    with_live,
)


def load(tmp_path: Path, text: str = "", *overrides: str, environment: dict[str, str] | None = None) -> Settings:
    path = tmp_path / "draftwire.toml"
    path.write_text(text)
    return load_settings(path, overrides, environment or {})


def refused(tmp_path: Path, text: str = "", *overrides: str, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text, *overrides, environment=environment)
    assert "\n" not in caught.value.message
    return str(caught.value)


def test_no_file_means_defaults() -> None:
    """Without a file, environment or flags, the settings are the defaults, with one draft worker."""
    assert load_settings(None, (), {}) == Settings()
    assert list(Settings().draft) == ["model"]


def test_a_file_is_read(tmp_path: Path) -> None:
    """Values of a file land in their typed places, lists as tuples and integers as floats where floats are wanted."""
    settings = load(
        tmp_path,
        """
        run_dir = "/run/x"
        drain_s = 3
        [gateway]
        port = 0
        [verifier]
        n_max = 7
        engine = { engine = "null", override_tensors = ["a=CPU", "b=CPU"] }
        [draft.gpu-1]
        [draft.text]
        drafter = "ngram"
        """,
    )
    assert settings.run_path == Path("/run/x")
    assert isinstance(settings.drain_s, float)
    assert settings.drain_s == 3
    assert settings.gateway.port == 0
    assert settings.verifier.n_max == 7
    assert settings.verifier.engine.override_tensors == ("a=CPU", "b=CPU")
    assert settings.draft == {"gpu-1": DraftSettings(), "text": DraftSettings(drafter="ngram")}
    assert settings.draft["gpu-1"].engine.model == "embedded:draft"


def test_flags_beat_the_environment_and_it_beats_the_file(tmp_path: Path) -> None:
    """Precedence: --set, then DRAFTWIRE_ variables, then the file; a later --set beats an earlier one."""
    text = "[verifier]\nn_max = 1\ntop_k_rows = 1\nprefill_chunk = 1"
    environment = {"DRAFTWIRE_VERIFIER__TOP_K_ROWS": "2", "DRAFTWIRE_VERIFIER__PREFILL_CHUNK": "2"}
    settings = load(
        tmp_path, text, "verifier.prefill_chunk=9", "verifier.prefill_chunk=3", environment=environment
    ).verifier
    assert (settings.n_max, settings.top_k_rows, settings.prefill_chunk) == (1, 2, 3)


def test_overrides_are_toml_or_bare_words(tmp_path: Path) -> None:
    """A value in --set or in the environment is TOML where it is valid TOML, and else a string."""
    settings = load(
        tmp_path,
        "",
        "log_level=debug",
        'gateway.host="127.0.0.2"',
        "verifier.engine.flash_attention=true",
        "verifier.engine.override_tensors=['a=b']",
        "draft.a.drafter=ngram",
        environment={
            "DRAFTWIRE_RUN_DIR": "/tmp/some where",
            "DRAFTWIRE_CONFIG": "/elsewhere",
            "DRAFTWIRE_API_KEY": "dw-x",
        },
    )
    assert settings.log_level == "debug"
    assert settings.gateway.host == "127.0.0.2"
    assert settings.verifier.engine.flash_attention is True
    assert settings.verifier.engine.override_tensors == ("a=b",)
    assert settings.draft["a"].drafter == "ngram"
    assert settings.run_dir == "/tmp/some where"


def test_devices_are_a_list_of_integers_everywhere(tmp_path: Path) -> None:
    """The GPUs of an engine come from a file, a variable or a flag alike, as a TOML list; without any, the first."""
    settings = load(
        tmp_path,
        "[verifier.engine]\ndevices = [2]\n[draft.a.engine]\ndevices = [3, 1]\n[draft.b]\n[draft.c]",
        "draft.b.engine.devices=[0,1]",
        "verifier.engine.kv_pages=4096",
        environment={"DRAFTWIRE_VERIFIER__ENGINE__DEVICES": "[0, 1]", "DRAFTWIRE_DRAFT__C__ENGINE__DEVICES": "[]"},
    )
    assert settings.verifier.engine.devices == (0, 1)
    assert settings.verifier.engine.kv_pages == 4096
    assert [settings.draft[name].engine.devices for name in "abc"] == [(3, 1), (0, 1), ()]
    assert Settings().verifier.engine.devices == (0,)
    assert Settings().verifier.engine.kv_pages == 0


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an environment given, os.environ counts."""
    monkeypatch.setenv("DRAFTWIRE_ROUTER__WINDOW", "3")
    assert load_settings().router.window == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rundir = 'x'", ("unknown key rundir", "did you mean run_dir?")),
        ("[verifier]\nnmax = 1", ("unknown key verifier.nmax", "did you mean verifier.n_max?")),
        ("[verifier.engine]\nmodell = 'x'", ("verifier.engine.modell", "did you mean verifier.engine.model?")),
        ("[draft.a]\ndraftr = 'ngram'", ("draft.a.draftr", "did you mean draft.a.drafter?")),
        ("[gateway]\nzzz = 1", ("unknown key gateway.zzz", "known here:", "port")),
        ("[gatway]\nport = 1", ("unknown key gatway", "did you mean gateway?")),
        ("[gateway]\nport = '80'", ("gateway.port is '80'", "type int")),
        ("[gateway]\nport = 80.0", ("gateway.port is 80.0", "type int")),
        ("[gateway]\nport = true", ("gateway.port is True", "type int")),
        ("drain_s = false", ("drain_s is False", "type float")),
        ("run_dir = 1", ("run_dir is 1", "type str")),
        ("[verifier.engine]\nflash_attention = 1", ("flash_attention is 1", "type bool")),
        ("[verifier.engine]\noverride_tensors = 'x'", ("override_tensors must be a list", 'override_tensors=["text"]')),
        ("[verifier.engine]\noverride_tensors = ['x', 1]", ("override_tensors[1] is 1", "type str")),
        ("[verifier.engine]\ndevices = 1", ("devices must be a list", "devices=[0]")),
        ("[verifier.engine]\ndevices = [0, '1']", ("devices[1] is '1'", "type int")),
        ("[draft.a.engine]\ndevices = [true]", ("devices[0] is True", "type int")),
        ("[verifier.engine]\nkv_pages = '1'", ("kv_pages is '1'", "type int")),
        ("[verifier.engine]\nrole = 'both'", ("engine.role is 'both'", "'target', 'draft'")),
        ("[verifier.engine]\npace = 1", ("verifier.engine.pace must be a table",)),
        ("[verifier.engine.pace]\nfirst_row = 1", ("did you mean verifier.engine.pace.first_row_ms?",)),
        ("[draft.a.engine.pace]\nfurther_row_ms = -1", ("draft.a.engine.pace.further_row_ms is -1", "from 0 to 30000")),
        ("[verifier.engine.pace]\nprefill_per_second = nan", ("prefill_per_second is nan", "from 0 to 1e+06")),
        ("gateway = 1", ("gateway must be a table",)),
        ("draft = 1", ("draft must be a table",)),
        ("draft = { a = 1 }", ("draft.a must be a table",)),
        ("[gateway]\nport = 65536", ("gateway.port is 65536", "from 0 to 65535")),
        ("[router]\nwindow = 0", ("router.window is 0", "from 1 to 64")),
        ("[verifier]\nn_max = -1", ("verifier.n_max is -1", "from 0 to 64")),
        ("drain_s = nan", ("drain_s is nan", "from 0 to 3600")),
        ("drain_s = inf", ("drain_s is inf", "from 0 to 3600")),
        ("log_level = 'loud'", ("log_level is 'loud'", "'debug'", "'error'")),
        ("log_level = []", ("log_level is []", "one of")),
        ("[draft.a]\ndrafter = 'magic'", ("draft.a.drafter is 'magic'", "'ngram'")),
        ("[draft.'a b']", ("draft.a b", "names are letters, digits")),
        ("[draft.'../x']", ("draft.../x", "names are letters, digits")),
        (f"[draft.{'x' * 41}]", ("names are letters, digits", "at most 40")),
        ("this is not TOML", ("is not valid TOML",)),
        ("a = 1\na = 2", ("is not valid TOML",)),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    """The refusal names the file and the key, and says what would be right."""
    message = refused(tmp_path, text)
    assert str(tmp_path / "draftwire.toml") in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("verifier.n_max", "not of the form section.key=value"),
        ("verifier.n_mx=1", "did you mean verifier.n_max?"),
        ("verifier.n_max=many", "verifier.n_max is 'many'"),
        ("verifier.engine.devices=0", "verifier.engine.devices must be a list (such as devices=[0])"),
        ("draft.a.engine.devices=0,1", "draft.a.engine.devices must be a list (such as devices=[0])"),
        ("run_dir.x.y=1", "run_dir"),
        ("log_level.x=1", "log_level"),
        ("=1", "unknown key"),
        ("verifier=1", "verifier must be a table"),
    ],
)
def test_a_wrong_flag_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    """A --set that names no key or a wrong value is refused, not ignored."""
    assert expected in refused(tmp_path, "run_dir = '/x'\nlog_level = 'info'", override)


def test_a_wrong_variable_is_refused(tmp_path: Path) -> None:
    """A DRAFTWIRE_ variable that names no key is refused, with a suggestion."""
    message = refused(tmp_path, "", environment={"DRAFTWIRE_GATEWAY__PROT": "1"})
    assert "did you mean gateway.port?" in message


def test_a_key_below_a_value_is_refused(tmp_path: Path) -> None:
    """A flag cannot reach into a key that holds no table."""
    assert "run_dir is not a table" in refused(tmp_path, "run_dir = '/x'", "run_dir.x=1")


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    """A path that is not there, a directory, and a file that is no text each give one clear line."""
    missing = tmp_path / "none.toml"
    with pytest.raises(SettingsError, match=r"no configuration file .*none\.toml"):
        load_settings(missing, (), {})
    with pytest.raises(SettingsError, match=f"cannot read {tmp_path}"):
        load_settings(tmp_path, (), {})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_settings(binary, (), {})


# -- endpoints --


def endpoint(value: str) -> str:
    return load_settings(None, (f'endpoints.router="{value}"',), {}).endpoint("router")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
def test_a_gateway_on_loopback_needs_no_keys(address: str) -> None:
    """Nobody else reaches it."""
    assert not GatewaySettings().is_open(address, insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.2", "fe80::1%eth0", "::ffff:192.168.1.2"])
def test_a_gateway_that_is_open_needs_keys(address: str) -> None:
    """Without them it is refused, unless a flag allows it."""
    with pytest.raises(SettingsError, match="open to the network"):
        GatewaySettings().is_open(address, insecure=False)
    assert GatewaySettings().is_open(address, insecure=True)
    assert GatewaySettings(api_keys="/etc/keys").is_open(address, insecure=False)


@pytest.mark.parametrize(
    "value",
    ["ipc:///run/x.sock", "tcp://127.0.0.1:5555", "tcp://localhost:1", "tcp://[::1]:65535", "tcp://127.1.2.3:9"],
)
def test_private_endpoints_need_no_keys(value: str, tmp_path: Path) -> None:
    """ipc and loopback need no keys."""
    assert endpoint(value) == value
    check(value, tmp_path)


def check(value: str, tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    """What is warned of when a host without keys uses an endpoint."""
    warned: list[dict[str, Any]] = []
    overrides = (f'endpoints.router="{value}"', f'network.keys="{tmp_path}"', *more)
    check_endpoints(
        load_settings(None, overrides, {}), lambda event, **fields: warned.append({"event": event} | fields)
    )
    return warned


@pytest.mark.parametrize(
    "value", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://192.168.1.2:5555", "tcp://example.org:5555", "tcp://[::]:1"]
)
def test_endpoints_open_to_the_network_are_refused(value: str, tmp_path: Path) -> None:
    """Without keys nothing but this host may connect; the refusal says what to do instead."""
    with pytest.raises(SettingsError, match=r"open to the network.*draftwire keys init.*or use ipc://"):
        check(value, tmp_path)
    (warning,) = check(value, tmp_path, "network.insecure=true")
    assert (warning["event"], warning["endpoint"]) == ("insecure_endpoint", value)
    write_host_key(tmp_path, new_host_key("box"))
    assert check(value, tmp_path) == []


# -- several sources --


def test_drop_ins_lie_on_top_in_the_order_of_their_names(tmp_path: Path) -> None:
    """FILE.d/*.toml, each over those before it, table by table; the rest of the directory is left alone."""
    path = tmp_path / "draftwire.toml"
    path.write_text("drain_s = 1\n[verifier]\nn_max = 2\nmax_waiting = 3\n[draft.a]\n")
    more = tmp_path / "draftwire.toml.d"
    more.mkdir()
    (more / "20-b.toml").write_text("[verifier]\nn_max = 5\n")
    (more / "10-a.toml").write_text('[verifier]\nn_max = 4\n[draft.b]\ndrafter = "ngram"\n')
    (more / "30-c.toml.bak").write_text("nonsense")
    effective = load_effective(path, ["gateway.port=0"], {"DRAFTWIRE_LOG_LEVEL": "debug"})
    settings = effective.settings
    assert (settings.verifier.n_max, settings.verifier.max_waiting, settings.drain_s) == (5, 3, 1.0)
    assert settings.draft == {"a": DraftSettings(), "b": DraftSettings(drafter="ngram")}
    assert effective.files == (path, more / "10-a.toml", more / "20-b.toml")
    assert effective.origins == {
        "drain_s": str(path),
        "verifier.n_max": str(more / "20-b.toml"),
        "verifier.max_waiting": str(path),
        "draft.a": str(path),
        "draft.b.drafter": str(more / "10-a.toml"),
        "log_level": "DRAFTWIRE_LOG_LEVEL",
        "gateway.port": "--set gateway.port=0",
    }


def test_a_table_given_as_a_flag_takes_the_place_of_the_one_below() -> None:
    """So `draft={}` means no worker, and `endpoints={}` those of the run directory, whatever the file says."""
    loaded = load_effective(
        None, ["draft.far.q_top_k=3", 'endpoints.router="tcp://127.0.0.1:5"', "draft={}", "endpoints={}"], {}
    )
    assert (loaded.settings.draft, loaded.settings.endpoints.router) == ({}, "")


@pytest.mark.parametrize(
    "text", ["[verifier]\nn_max = 1000\n", "[verifier]\nn_mxa = 1\n", "verifier = 3\n", "verifier."]
)
def test_what_is_wrong_in_a_drop_in_is_named_with_it(tmp_path: Path, text: str) -> None:
    """The file that a value comes from is the one to mend."""
    path = tmp_path / "draftwire.toml"
    path.write_text("[verifier]\nmax_waiting = 3\n")
    (tmp_path / "draftwire.toml.d").mkdir()
    (tmp_path / "draftwire.toml.d/x.toml").write_text(text)
    with pytest.raises(SettingsError, match=r"draftwire\.toml\.d/x\.toml.*"):
        load_settings(path, (), {})


def test_what_a_reload_changes_is_told_from_what_needs_a_restart() -> None:
    """Limits and the log level change at once, and the table of workers; models and sockets do not."""
    old = load_settings(None, ["draft.a.q_top_k=7"], {})
    new = load_settings(
        None,
        [
            *("draft.a.q_top_k=8", "draft.b={}", "log_level=debug", "gateway.max_requests=3", "gateway.port=1"),
            *("verifier.engine.n_ctx=77", "router.max_sessions=9"),
        ],
        {},
    )
    assert changed_keys(old, new) == {
        "draft.a.q_top_k": False,
        "draft.b": True,
        "gateway.max_requests": True,
        "gateway.port": False,
        "log_level": True,
        "router.max_sessions": True,
        "verifier.engine.n_ctx": False,
    }
    merged = with_live(old, new)
    assert (merged.log_level, merged.gateway.max_requests, merged.router.max_sessions) == ("debug", 3, 9)
    assert (merged.gateway.port, merged.verifier.engine.n_ctx) == (old.gateway.port, old.verifier.engine.n_ctx)
    assert (merged.draft["a"].q_top_k, set(merged.draft)) == (7, {"a", "b"})
    assert changed_keys(merged, new) == {k: v for k, v in changed_keys(old, new).items() if not v}


@pytest.mark.parametrize(
    "value", ["tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:x"]
)
def test_tcp_endpoints_need_a_port(value: str) -> None:
    """A TCP endpoint without a usable port is refused."""
    with pytest.raises(SettingsError, match="not tcp://HOST:PORT"):
        endpoint(value)


@pytest.mark.parametrize("value", ["udp://127.0.0.1:1", "ipc://", "127.0.0.1:5555", "inproc://x"])
def test_other_transports_are_refused(value: str) -> None:
    """Only ipc:// and tcp:// name sockets that another process can reach."""
    with pytest.raises(SettingsError, match="is no endpoint"):
        endpoint(value)


def test_the_default_endpoints_are_in_the_run_directory(tmp_path: Path) -> None:
    """Each socket has a file of its own there."""
    settings = Settings(run_dir=str(tmp_path))
    names: Any = ("router", "drafts", "tokenizer", "sampler")
    assert [settings.endpoint(name) for name in names] == [f"ipc://{tmp_path / name}.sock" for name in names]


@pytest.mark.parametrize(("length", "fits"), [(103, True), (104, False)])
def test_a_socket_path_has_a_length(length: int, fits: bool) -> None:
    """A run directory whose socket paths the kernel would cut is refused, counted in bytes."""
    run_dir = "/" + "é" * ((length - len("/x/router.sock")) // 2)
    run_dir += "x" * (length - len((run_dir + "/router.sock").encode()))
    settings = Settings(run_dir=run_dir)
    if fits:
        assert len(settings.endpoint("router").removeprefix("ipc://").encode()) == 103
    else:
        with pytest.raises(SettingsError, match=r"longer than 103 bytes.*\(choose a shorter run_dir\)"):
            settings.endpoint("router")


def test_the_default_run_directory_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_RUNTIME_DIR where there is one, else a directory that names the user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Settings().run_path == Path("/run/user/7/draftwire")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_run_dir().name == f"draftwire-{os.getuid()}"
