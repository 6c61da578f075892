"""What the system tells of the processor, and what is chosen by it."""

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

    def count(product, *_):
        tried.append(product)
        return None if len(tried) == 1 else 32

    monkeypatch.setattr(linear.processor, "vendor", lambda: vendor)
    monkeypatch.setattr(linear.onednn, "works", lambda: True)
    monkeypatch.setattr(linear, "_fewest_rows", count)
    linear._choice.cache_clear()
    try:
        chosen, _ = linear._choice(8, 8, False, 1, True)
    finally:
        linear._choice.cache_clear()
    order = [linear._pytorch, linear._onednn]
    order = order if first == "mkl" else order[::-1]
    assert tried == order and chosen is order[1]
