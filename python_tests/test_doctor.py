"""The report of an installation, and that its self-tests notice a backend that is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dp_bitfit_kernels import backends, cli


def test_the_report_names_versions_backends_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = {line[:20].strip(): line[20:].strip() for line in capsys.readouterr().out.splitlines()}
    assert lines["torch"] == torch.__version__
    assert lines["reference on cpu"].startswith("ok")
    assert lines["native on cpu"].startswith(("ok", "not available: "))
    assert lines["triton on cpu"].startswith("not available: Triton")
    assert "native on cuda" in lines


def wrong(name: str) -> backends.Backend:
    """The reference with one op spoilt."""
    right = backends.select("reference", "cpu")
    original = getattr(right, name)

    def spoilt(*arguments):  # type: ignore[no-untyped-def]
        result = original(*arguments)
        if name == "clipped_sum_":
            arguments[0][0] += 1
        elif name == "clip_factors":
            result[0][0, 0] *= 1.0 + 1e-9
        else:
            result.view(-1)[0] += 1
        return result

    return dataclasses.replace(right, **{name: spoilt})


@pytest.mark.parametrize("name", ["bias_grad", "clip_factors", "clipped_sum_", "noisy_sum", "random_words"])
def test_a_wrong_op_is_found(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = wrong(name)
    monkeypatch.setattr(backends, "select", lambda *_: spoilt)
    assert cli.main(["doctor"]) == 1
    assert "reference on cpu     FAILED" in capsys.readouterr().out
