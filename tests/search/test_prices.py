"""Prices: a step by hand, and files that are refused with what would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.errors import InputError
from search.prices import read_prices

TEXT = 'currency = "EUR"\n[per_hour]\nh100-sxm = 3.6\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "prices.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_step_by_hand(tmp_path: Path) -> None:
    found = read_prices(written(tmp_path, TEXT)).cost("h100-sxm", num_gpus=4, step_time_s=10.0, tokens=1000.0)
    assert found == {"currency": "EUR", "per_gpu_hour": 3.6, "per_step": pytest.approx(0.04), "per_token": pytest.approx(4e-5)}


def test_a_device_without_a_price_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"per_hour\.l4: no price of this device; priced are h100-sxm"):
        read_prices(written(tmp_path, TEXT)).cost("l4", num_gpus=1, step_time_s=1.0, tokens=1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("currency = ", "not TOML"),
        ("[per_hour]\nl4 = 1.0\n", 'a name such as "USD" must be given'),
        ('currency = "USD"\n', "a table of prices by device must be given"),
        ('currency = "USD"\n[per_hour]\nl4 = -1\n', "0 < price < inf must hold"),
        ('currency = "USD"\nhourly = 3\n', "unknown key; known are currency, per_hour"),
    ],
)
def test_refusals(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_prices(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give the path of a price file"):
        read_prices(tmp_path / "none.toml")
