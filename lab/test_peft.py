"""peft's folders: read, written, read by peft again; and refused, by name, where nothing fits."""
import copy
import json

import pytest
import torch
from torch import nn

import loft

peft = pytest.importorskip("peft")
from lab.peft_files import from_peft, to_peft  # noqa: E402

MODEL = nn.Sequential(nn.Linear(16, 24), nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 16)))


def folder(path, kind, options):
    """Writes an adapter of peft's, moved off its start, to `path`; returns its model."""
    config = getattr(peft, f"{kind}Config")(target_modules=r"0|1\.1", **options)
    model = peft.get_peft_model(copy.deepcopy(MODEL), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.05 * p.requires_grad
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("kind, options", [
    ("OFT", dict(oft_block_size=4, num_cayley_neumann_terms=3, module_dropout=0.1)),
    ("OFT", dict(oft_block_size=8, block_share=True, coft=True, eps=0.1, use_cayley_neumann=False)),
    ("BOFT", dict(boft_block_size=4)), ("HRA", dict(r=4)),
    ("Psoft", dict(r=6, psoft_mag_a=False, use_cayley_neumann=True)),
    ("Lora", dict(r=4, use_rslora=True))])
def test_from_peft_and_back(kind, options, tmp_path):
    """The same outputs, and the same layers: a list of names would mean suffixes to peft."""
    x = torch.randn(5, 16)
    y = folder(tmp_path / "theirs", kind, options)(x)
    ours = from_peft(copy.deepcopy(MODEL), tmp_path / "theirs")
    torch.testing.assert_close(ours(x), y)
    to_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(MODEL), tmp_path / "ours")
    torch.testing.assert_close(back(x), y)
    assert "1.0.base_layer" not in str(back.state_dict().keys())


@pytest.mark.parametrize("change, words", [
    (dict(peft_type="VERA"), "peft's VERA"), (dict(novelty=2), "peft's OFT with novelty=2 has no"),
    (dict(psoft_orth=False), "psoft_orth=False"),
    (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    (dict(peft_version=None), "before 0.18")])
def test_from_peft_refuses_by_name(change, words, tmp_path):
    folder(tmp_path, "OFT", dict(oft_block_size=8))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        from_peft(copy.deepcopy(MODEL), tmp_path)


@pytest.mark.parametrize("arguments, words", [
    (dict(method="oft", map="cayley_neumann", terms=3), "layer '0': peft has no series of 3 terms"),
    (dict(method="oft", side="output"), "input side only"),
    (dict(rank=4, support="random"), "layer '0': its support does not span"),
    (dict(rank=4, trainable=["0.bias"]), "0.bias train beside")])
def test_to_peft_refuses_by_name(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        to_peft(loft.adapt(copy.deepcopy(MODEL), **arguments), tmp_path / "out")
    assert not (tmp_path / "out").exists()
