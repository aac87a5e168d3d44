"""export: what another runtime or PyTorch alone makes of the file equals what the run computes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import runs

from trainer import checkpoint
from trainer.__main__ import main
from trainer.commands import export, load
from trainer.config import UserError
from trainer.methods.tables import TableMethod

SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A finished run of a tiny Swin, whose maps are (N, H, W, C), without mirror symmetry."""
    root = tmp_path_factory.mktemp("swin")
    flags = ["--backbone=swin_tiny_patch4_window7_224", f"--backbone.options={json.dumps(SWIN)}", "--name=swin"]
    assert runs.train(root, *flags, "--data.train-size=16") == 0
    return root / "swin"


def images(n, size=32):
    return torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


@torch.no_grad()
def truth(run, pixels):
    """Logits and maps of uint8 images by the run's weights, with the normalisation and the head written out."""
    method = load(str(run), "cpu").method.eval()
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    features = method.backbone.model.forward_features(x)
    features = features.permute(0, 3, 1, 2) if "swin" in str(run) else features
    weight, bias = method.head.weight, method.head.bias
    maps = torch.einsum("lc,nchw->nlhw", weight, features)
    return maps.mean((2, 3)) + bias, maps


def onnx(path):
    """The outputs of an ONNX file for an input, and what the file says of itself."""
    runtime = pytest.importorskip("onnxruntime", reason="running an ONNX model needs onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch"
    return (
        lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": np.ascontiguousarray(x)})],
        {
            k: v if k in ("run", "colours", "input") else json.loads(v)
            for k, v in session.get_modelmeta().custom_metadata_map.items()
        },
    )


def program(path):
    extra = {"about.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    return module, json.loads(extra["about.json"])


def near(got, expected):
    return (got - expected).abs().max() / expected.abs().max() < 1e-5


CLASSES = ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]


def test_a_program_of_pixels_in_batches_of_any_size(finished, tmp_path, capsys):
    assert main(["export", str(finished), str(tmp_path / "a.pt2")]) == 0
    assert f"{tmp_path}/a.pt2: logits and maps of one, epoch " in capsys.readouterr().out
    run, about = program(tmp_path / "a.pt2")
    for n in (1, 2, 5):
        logits, maps = truth(finished, images(n))
        got = run(images(n))
        assert near(got[0], logits) and near(got[1], maps)
    assert about["classes"] == CLASSES and about["run"].startswith("one, epoch ")
    assert about["input"] == "uint8 RGB (N, h, w, 3)" and about["image_size"] == 32
    assert (about["mean"], about["std"]) == ([0.5], [0.5])


@pytest.mark.filterwarnings("ignore")
def test_a_swin_in_onnx(swin, tmp_path):
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
    assert main(["export", str(swin), str(tmp_path / "a.onnx")]) == 0
    run, about = onnx(tmp_path / "a.onnx")
    for n in (1, 3):
        logits, maps = truth(swin, images(n))
        got = run(images(n))
        assert near(got[0], logits) and near(got[1], maps)
    assert about["classes"] == CLASSES and about["input"] == "uint8 RGB (N, h, w, 3)"


@pytest.fixture
def fake(monkeypatch):
    """In place of a program, which takes seconds: a file that says nothing and outputs that are off by a factor."""

    def program(network, images, about):
        return b"program", lambda x: tuple(fake.factor * y for y in network(x))

    fake = SimpleNamespace(factor=1.0)
    monkeypatch.setattr(export, "_program", program)
    return fake


def test_a_file_that_computes_something_else_is_not_kept(finished, tmp_path, capsys, fake):
    out, fake.factor = tmp_path / "a.pt2", 1.001
    assert main(["export", str(finished), str(out)]) == 2
    assert (
        "but its outputs differ from those of the run by up to 1.0e-03 of the largest, over 0.0001; nothing is written"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
    fake.factor = 1.00001
    assert main(["export", str(finished), str(out)]) == 0
    out.write_bytes(b"mine")
    assert main(["export", str(finished), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_bytes() == b"mine"
    fake.factor = float("nan")
    assert main(["export", str(finished), str(out), "--overwrite"]) == 2 and out.read_bytes() == b"mine"
    assert main(["export", str(finished), str(tmp_path / "a.pth")]) == 2
    assert "expected a name that ends with .onnx or .pt2" in capsys.readouterr().err


def test_a_method_without_maps_has_logits_only(finished, tmp_path, monkeypatch, capsys, fake):
    def none(self, images):
        raise UserError("method: has no maps")

    monkeypatch.setattr(TableMethod, "maps", none)
    assert main(["export", str(finished), str(tmp_path / "a.pt2")]) == 0
    said = capsys.readouterr().out
    assert "note: logits only: method: has no maps" in said and "a.pt2: logits of one" in said


def test_best_pt_holds_no_more_than_the_weights(finished):
    saved = checkpoint.read(finished / "best.pt")
    size = sum(tensor.nbytes for tensor in saved["model"].values())
    tensors = [name for name, value in saved.items() if isinstance(value, torch.Tensor)]
    assert tensors == [] and {"optimizer", "average", "scaler"}.isdisjoint(saved)
    files = len(json.dumps(saved["identity"]))
    entries = 400 * len(saved["model"])  # of the zip file, for each tensor
    assert (finished / "best.pt").stat().st_size < size + files + entries + 10_000
    assert (finished / "last.pt").stat().st_size > 3 * size


def test_a_run_of_another_machine_is_evaluated_on_this_one(copy):
    """Options about training, which a CPU may not have, do not matter afterwards."""
    path = copy / "one/best.pt"
    saved = checkpoint.read(path)
    saved["config"]["compute"] |= {"cuda_graph": True, "sync_batchnorm": True, "compile": True, "device": "cuda"}
    checkpoint.save(path, saved)
    assert main(["evaluate", str(copy / "one"), "--device=cpu"]) == 0
