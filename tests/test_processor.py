"""What the system tells of the processor, and what is chosen by it."""

import math

import pytest

from ops import linear
from utils import processor


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A folder in the place of Linux's own files."""
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "_CACHES", tmp_path)
    functions = processor.vendor, processor.largest_cache
    for function in functions:
        function.cache_clear()
    yield tmp_path
    for function in functions:
        function.cache_clear()


def test_what_is_told(system):
    (system / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t: 1\n")
    for index, size in enumerate(("32K\n", "2048K\n", "33M\n")):
        (system / f"index{index}").mkdir()
        (system / f"index{index}" / "size").write_text(size)
    assert processor.vendor() == "GenuineIntel"
    assert processor.largest_cache() == 33 << 20


def test_what_is_not_told(system):
    assert processor.vendor() == "" and processor.largest_cache() == 0
    processor.vendor.cache_clear()
    processor.largest_cache.cache_clear()
    (system / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")  # ARM
    (system / "index0").mkdir()
    for text in ("", "unknown", "-"):
        (system / "index0" / "size").write_text(text)
        assert processor.largest_cache() == 0
        processor.largest_cache.cache_clear()
    assert processor.vendor() == ""


@pytest.mark.parametrize("vendor, first", [("GenuineIntel", "mkl"), ("AuthenticAMD", "onednn")])
def test_products_by_the_maker_of_the_processor(monkeypatch, vendor, first):
    tried = []

    def refusing(product, multiple=1, most=math.inf):
        return lambda weight, bias: tried.append((product, multiple, most))

    monkeypatch.setattr(linear.processor, "vendor", lambda: vendor)
    monkeypatch.setattr(linear.onednn, "works", lambda: True)
    monkeypatch.setattr(linear, "_of_any_number", refusing)
    monkeypatch.setattr(linear, "_filled_up_to", refusing)
    linear._choice.cache_clear()
    try:
        assert linear._choice(8, 8, False, 1, True) == linear._Way(linear._blocks)
    finally:
        linear._choice.cache_clear()
    filled_up = [(multiple, most) for most in linear._MOST_FILLED_UP for multiple in (12, 24)]
    onednn = [(linear._onednn, *each) for each in ((1, math.inf), *filled_up)]
    mkl = [(linear._pytorch, 1, math.inf)]
    assert tried == (mkl + onednn if first == "mkl" else onednn + mkl)
