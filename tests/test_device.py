import pytest
import torch

from nnclr.device import choose_device
from nnclr.errors import InputError


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cuda:99", "mps", "meta", "tpu9", "", "cpu:0", "cuda:-1", "CPU"])
def test_what_is_not_there_is_one_plain_sentence_with_what_is(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        choose_device(name)
    assert str(caught.value) == (
        f"device={name} cannot be used; choose auto or cpu: PyTorch finds no CUDA device here, or was installed "
        "without CUDA"
    )


def test_the_numbers_of_several_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, words in ((1, "cuda or cuda:0"), (8, "cuda or cuda:0 to cuda:7")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(InputError, match=f"device=xpu cannot be used; choose auto, cpu, {words}$"):
            choose_device("xpu")


def test_what_is_there_is_taken():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
