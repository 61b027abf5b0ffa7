"""Names of devices in the wild: each finds its device, no name stands for two, unknown ones say what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.aliases import closest_device, device_named, known_devices, read_aliases
from hardware_models.catalogue import catalogue_names, load_hardware
from hardware_models.errors import InputError, UnknownNameError

DRIVER_NAMES = {
    "Tesla P100-SXM2-16GB": "p100-sxm2", "Tesla P100-PCIE-16GB": "p100-pcie", "Tesla V100-SXM2-16GB": "v100-sxm2-16gb", "Tesla V100-SXM2-32GB": "v100-sxm2-32gb",
    "Tesla V100-PCIE-32GB": "v100-pcie-32gb", "Tesla T4": "t4", "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb", "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb", "NVIDIA A30": "a30", "NVIDIA A40": "a40", "NVIDIA L4": "l4", "NVIDIA L40": "l40", "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200-sxm",
    "NVIDIA GH200 480GB": "gh200", "NVIDIA B200": "b200", "NVIDIA B300 SXM6 AC": "b300", "NVIDIA GB200": "gb200", "NVIDIA GB300": "gb300",
}  # fmt: skip
TABLE_NAMES = {
    "A100": "a100-sxm-80gb", "V100": "v100-sxm2-32gb", "a100_80": "a100-sxm-80gb", "a100_40": "a100-sxm-40gb", "h200": "h200-sxm", "l40": "l40", "a40": "a40",
    "v100": "v100-sxm2-32gb", "p100": "p100-sxm2", "h100_pcie": "h100-pcie", "gh200": "gh200", "b200_bf16_ceperm": "b200", "a100_pcie": "a100-pcie-80gb",
    "NVIDIA A100 SXM": "a100-sxm-80gb", "NVIDIA A100 PCIe": "a100-pcie-80gb", "NVIDIA H100 SXM": "h100-sxm", "NVIDIA H200 SXM": "h200-sxm",
    "NVIDIA GH200 SXM": "gh200", "NVIDIA B200 SXM": "b200", "NVIDIA B300 SXM": "b300", "NVIDIA GB200 SXM": "gb200", "h100_sxm": "h100-sxm",
    "b200_sxm": "b200", "A100-SXM": "a100-sxm-80gb", "A100-SXM-80GB": "a100-sxm-80gb", "H100-SXM": "h100-sxm", "B200-SXM": "b200",
    "A100-class (NVIDIA Ampere, 80GB assumed)": "a100-sxm-80gb", "H100-SXM-96GB-HBM2e-500W": "h100-sxm-96gb", "A100 DGX": "a100-sxm-80gb",
    "H100 DGX": "h100-sxm", "A40 pairwise NVLink": "a40", "P100-PCIe-16GB": "p100-pcie", "V100-PCIe-32GB": "v100-pcie-32gb", "RTX 4090": "rtx-4090",
    "H200-SXM-141GB": "h200-sxm", "B300-SXM-288GB": "b300", "GH200-96GB": "gh200", "H100-PCIe-80GB": "h100-pcie",
}  # fmt: skip


@pytest.mark.parametrize(("text", "device"), [*DRIVER_NAMES.items(), *TABLE_NAMES.items()])
def test_names_in_the_wild(text: str, device: str) -> None:
    assert device_named(text) == device


def test_every_catalogued_device_has_a_driver_name_but_one() -> None:
    assert set(catalogue_names()) - set(DRIVER_NAMES.values()) == {
        "h100-sxm-96gb"
    }  # the driver does not tell that board from others


def test_names_are_those_of_the_catalogue() -> None:
    assert known_devices() == catalogue_names()
    assert all(device_named(name) == name for name in catalogue_names())


@given(st.sampled_from(sorted(DRIVER_NAMES)), st.data())
def test_case_and_punctuation_do_not_matter(text: str, data: st.DataObject) -> None:
    changed = "".join(
        data.draw(st.sampled_from([character.lower(), character.upper()]))
        + ("" if character.isalnum() else data.draw(st.sampled_from(["", "_", " ", "--"])))
        for character in text
    )
    assert device_named(changed) == DRIVER_NAMES[text]


def test_memory_tells_boards_apart() -> None:
    assert device_named("A100-SXM", memory_gb=40) == "a100-sxm-40gb"
    assert device_named("A100-SXM", memory_gb=80.0) == "a100-sxm-80gb"
    assert device_named("V100", memory_gb=16) == "v100-sxm2-16gb"
    assert device_named("H100-SXM", memory_gb=96) == "h100-sxm-96gb"
    assert device_named("NVIDIA L4", memory_gb=24) == "l4"
    with pytest.raises(InputError, match=r"table.csv: memory_gb = 64: 'A100' has 40 or 80 GB; correct the size"):
        device_named("A100", memory_gb=64, source="table.csv")


@pytest.mark.parametrize("text", ["rtx3090", "unlabelled", "AMD MI300X", "Intel Gaudi 2", "", "A10", "L20"])
def test_other_devices_are_not_taken_for_one(text: str) -> None:
    with pytest.raises(UnknownNameError, match="schedlab calibrate --device cuda") as caught:
        device_named(text)
    assert caught.value.known == catalogue_names()


def test_message_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"known are a100-pcie-80gb, .*did you mean 'h200-sxm'"):
        device_named("H200 SMX")
    assert closest_device("zzzz") is None


def test_a_name_of_two_devices_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "aliases.toml"
    path.write_text('[names]\na = ["Same"]\nb = ["sa-me"]\n[by_memory]\n')
    with pytest.raises(InputError, match=r"names\.b = 'sa-me': a name stands for one device, but this one is 'a' too"):
        read_aliases(path)


def test_other_names_are_offered_not_taken_by_load_hardware() -> None:
    # 'h100' could be the SXM or the PCIe board: who simulates says which
    with pytest.raises(UnknownNameError, match=r"did you mean 'h100-sxm'\?"):
        load_hardware("h100")
