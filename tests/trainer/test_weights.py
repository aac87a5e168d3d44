"""Files of weights in the containers that people have: each is recognised, and its features are those of a program
that shares no code with the trainer. What would run code, or match too little, is refused."""

import dataclasses
import os
import pickle
import re
import shlex

import pytest
import timm
import torch
import torchvision
from support import runs
from support.machine import ROOT
from support.weight_files import (
    IMAGENET,
    TINY,
    assert_near,
    caffe_tensors,
    config,
    create,
    features,
    lite0,
    lite0_blocks,
    normalised,
    pixels,
    python2,
    randomised,
)
from torch import nn
from torch.nn import functional as F

from trainer import backbones, checkpoint, loop, presets, weights
from trainer.__main__ import main, parse
from trainer.config import Backbone, UserError
from trainer.presets import baseline

# The containers and conventions of face weights


@torch.no_grad()
def test_resnet18_in_a_state_dict_under_torchvisions_names(tmp_path, caplog):
    model = randomised(torchvision.models.resnet18())
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "resnet18_msceleb.pth")
    with caplog.at_level("INFO", "trainer"):
        backbone = create(tmp_path / "resnet18_msceleb.pth", "resnet18")
    expected = nn.Sequential(*list(model.children())[:-2])(normalised(pixels(), *IMAGENET))
    assert_near(features(backbone, pixels()), expected)
    assert "100 tensors match (100.0%); 2 left out: fc.weight, fc.bias" in caplog.text


@torch.no_grad()
def test_dreams_resnet18_has_a_prefix_and_pixels_from_0_to_1(tmp_path):
    model = randomised(torchvision.models.resnet18())
    content = {f"module.{n}": t for n, t in model.state_dict().items() if not n.startswith("fc.")}
    content |= {"module.feature.weight": torch.randn(256, 512), "module.feature.bias": torch.randn(256)}
    content |= {"module.fc.weight": torch.randn(9, 256), "module.fc.bias": torch.randn(9)}
    torch.save(
        {"state_dict": content, "best_prec1": 1.0, "arch": "a"},
        tmp_path / "a.pth.tar",
        _use_new_zipfile_serialization=False,
    )
    backbone = create(tmp_path / "a.pth.tar", "resnet18")
    assert backbone.origin["recipe"] == "dream_resnet18"
    expected = nn.Sequential(*list(model.children())[:-2])(normalised(pixels(), [0.0], [1.0]))
    assert_near(features(backbone, pixels()), expected)


def caffe_resnet50(tensors, x):
    """Caffe's ResNet-50 from its tensors, after its definition: BatchNorm in eval mode, stride in the first 1 x 1."""

    def conv_bn(x, conv, bn, stride=1, padding=0):
        x = F.conv2d(x, tensors[f"{conv}.weight"], stride=stride, padding=padding)
        return F.batch_norm(x, *(tensors[f"{bn}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    x = F.relu(conv_bn(x, "conv1", "bn1", 2, 3))
    bottom, right = (-(-(n - 3) // 2) * 2 + 3 - n for n in x.shape[2:])  # as far as the last window reaches
    x = F.max_pool2d(F.pad(x, (0, right, 0, bottom), value=-torch.inf), 3, 2)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride))
            y = F.relu(conv_bn(y, f"{name}.conv2", f"{name}.bn2", 1, 1))
            y = conv_bn(y, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = F.relu(x + y)
    return x


@torch.no_grad()
@pytest.mark.parametrize("container", ["python 2", "torch"])
def test_vggface2s_resnet50_strides_as_caffe_does_and_sees_blue_first(container, tmp_path):
    tensors = caffe_tensors()
    if container == "python 2":
        (tmp_path / "a.pkl").write_bytes(python2({n: t.numpy() for n, t in tensors.items()}))
    else:
        torch.save(tensors | {"fc.weight": torch.zeros(8631, 32)}, tmp_path / "a.pkl")
    backbone = create(tmp_path / "a.pkl", "resnet50", TINY, size=65)
    assert backbone.origin["recipe"] == "vggface2_resnet50"
    images = pixels(65)
    bgr = images.flip(-1).permute(0, 3, 1, 2).float() - torch.tensor([91.4953, 103.8827, 131.0912]).view(-1, 1, 1)
    assert_near(features(backbone, images), caffe_resnet50(tensors, bgr))


@torch.no_grad()
def test_swinfaces_stages_end_with_the_patch_merging(tmp_path):
    shape = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}
    options = {"img_size": 112, "patch_size": 2, **shape}
    model = randomised(
        torchvision.models.SwinTransformer(
            [2, 2], 16, list(shape["depths"]), list(shape["num_heads"]), [7, 7], num_classes=9
        )
    )
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):
            module.relative_position_bias_table.data.normal_()
    content = {}
    for name, tensor in model.state_dict().items():  # torchvision's names to those of the first program
        place, _, rest = name.partition(".")
        if place == "features":
            stage, _, rest = rest.partition(".")
            if stage == "0":
                name = "patch_embed." + rest.replace("0.", "proj.", 1).replace("2.", "norm.", 1)
            elif int(stage) % 2:
                rest = rest.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
                name = f"layers.{int(stage) // 2}.blocks.{rest}"
            else:
                name = f"layers.{int(stage) // 2 - 1}.downsample.{rest}"
        content[name] = tensor
    content |= {"feature.0.weight": torch.randn(9, 128), "layers.0.blocks.1.attn_mask": torch.zeros(1)}
    content = {n: t for n, t in content.items() if not n.startswith("head.")}
    torch.save({"state_dict_backbone": content, "global_step": 1}, tmp_path / "start_0.pt")
    backbone = create(tmp_path / "start_0.pt", "swin_tiny_patch4_window7_224", options, size=112)
    x = normalised(pixels(112), [0.5], [0.5])
    expected = model.norm(model.features(x)).permute(0, 3, 1, 2)
    assert_near(features(backbone, pixels(112)), expected)
    with pytest.raises(UserError, match="backbone.options: got .*, expected {'patch_size': 2} too"):
        create(tmp_path / "start_0.pt", "swin_tiny_patch4_window7_224", {"img_size": 112}, size=112)


@torch.no_grad()
def test_mobilenet_v2_under_torchvisions_names(tmp_path):
    model = randomised(torchvision.models.mobilenet_v2())
    torch.save(model.state_dict(), tmp_path / "mobilenet_v2.pth")
    backbone = create(tmp_path / "mobilenet_v2.pth", "mobilenetv2_100")
    assert_near(features(backbone, pixels()), model.features(normalised(pixels(), *IMAGENET)))


def lite0_tensors():
    random = torch.Generator().manual_seed(0)
    tensors = {}

    def add(conv, bn, out, into, kernel=1):
        size = (out, into, kernel, kernel)
        tensors[f"{conv}.weight"] = torch.randn(size, generator=random) * (2 / into) ** 0.5 / kernel
        tensors[f"{bn}.weight"] = torch.rand(out, generator=random) + 0.5
        tensors[f"{bn}.bias"] = torch.randn(out, generator=random) / 5
        tensors[f"{bn}.running_mean"] = torch.randn(out, generator=random) / 5
        tensors[f"{bn}.running_var"] = torch.rand(out, generator=random) + 0.5
        tensors[f"{bn}.num_batches_tracked"] = torch.tensor(0)

    add("_conv_stem", "_bn0", 32, 3, 3)
    channels = 32
    for i, (_, kernel, expansion, out) in enumerate(lite0_blocks()):
        name, wide = f"_blocks.{i}", channels * expansion
        if expansion > 1:
            add(f"{name}._expand_conv", f"{name}._bn0", wide, channels)
        add(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, kernel)
        add(f"{name}._project_conv", f"{name}._bn2", out, wide)
        channels = out
    add("_conv_head", "_bn1", 1280, 320)
    return tensors | {"_fc.weight": torch.randn(9, 1280), "_fc.bias": torch.randn(9)}


@torch.no_grad()
def test_efficientnet_lite0_pads_as_tensorflow_does(tmp_path):
    tensors = lite0_tensors()
    torch.save(tensors, tmp_path / "lite0.pth")
    backbone = create(tmp_path / "lite0.pth", "tf_efficientnet_lite0")
    assert_near(features(backbone, pixels()), lite0(tensors, normalised(pixels(), [0.5], [0.5])))
    with pytest.raises(UserError, match="got 'efficientnet_lite0', expected tf_efficientnet_lite0, which the weights"):
        create(tmp_path / "lite0.pth", "efficientnet_lite0")


@torch.no_grad()
def test_emotiefflibs_efficientnet_is_not_taken_for_timms_own(tmp_path):
    model = randomised(timm.create_model("tf_efficientnet_b0", num_classes=0))
    torch.save(model.state_dict(), tmp_path / "state_vggface2_enet0_new.pt")
    backbone = create(tmp_path / "state_vggface2_enet0_new.pt", "tf_efficientnet_b0")
    expected = model.forward_features(normalised(pixels(), *IMAGENET))
    assert_near(features(backbone, pixels()), expected)
    with pytest.raises(UserError, match="got 'efficientnet_b0', expected tf_efficientnet_b0, which the weights are of"):
        create(tmp_path / "state_vggface2_enet0_new.pt", "efficientnet_b0")


def test_what_is_asked_of_timm_is_normalised_as_timm_says(monkeypatch):
    asked, make = [], timm.create_model

    def offline(name, *, pretrained=False, **options):
        asked.append(pretrained)
        return make(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    options = config("", "resnet18", TINY | {"pretrained": True})
    first = backbones.create(options)
    again = backbones.create(options, first.origin)
    assert asked == [True, False], "a checkpoint needs no download"
    assert (first.mean, first.std) == (again.mean, again.std) == IMAGENET
    scratch = create("", "resnet18", TINY)
    assert (scratch.mean, scratch.std) == ((0.5,), (0.5,))


def test_the_weights_that_earlier_versions_exported_start_a_run(tmp_path):
    """A whole method's, with its head, and what this program says of its own files."""
    model = timm.create_model("resnet18", num_classes=0, **TINY)
    tensors = {f"backbone.model.{n}": t for n, t in randomised(model).state_dict().items()}
    about = {"recipe": "scratch", "sha256": "0"}
    weights.save(tmp_path / "a.safetensors", tensors | {"head.weight": torch.zeros(3, 8)}, about)
    backbone = create(tmp_path / "a.safetensors", "resnet18", TINY)
    assert backbone.origin == about and backbone.mean == (0.5,)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in backbone.model.state_dict().items())


# What is refused


def thin(seed=0):
    """The state dict of a thin ResNet-18."""
    torch.manual_seed(seed)
    return timm.create_model("resnet18", num_classes=9, **TINY).state_dict()


def refusal(content, tmp_path, name="resnet18", options=TINY):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="^backbone") as error:
        create(tmp_path / "a.pth", name, options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_less_than_90_percent_is_refused_and_what_is_missing_is_named(tmp_path, caplog):
    whole = {n: t for n, t in thin().items() if not n.startswith("fc.")}
    counted = [n for n in whole if not n.endswith("num_batches_tracked")]
    assert len(counted) == 105
    said = refusal({n: t for n, t in whole.items() if n not in counted[:11]}, tmp_path)
    assert "94 tensors match (89.5%); 11 missing: conv1.weight, bn1.weight, bn1.bias, bn1.running_mean and 7" in said
    torch.save({n: t for n, t in whole.items() if n not in counted[:10]}, tmp_path / "b.pth")
    with caplog.at_level("INFO", "trainer"):
        create(tmp_path / "b.pth", "resnet18", TINY)
    assert "95 tensors match (90.5%); 10 missing: conv1.weight" in caplog.text
    # Nothing that counts is in this file, so a load that is not strict would find nothing to do.
    assert "0 tensors match (0.0%)" in refusal({f"network/{n}": t for n, t in whole.items()}, tmp_path)
    # The file has more than the model, as an SE-ResNet has more than a ResNet.
    more = {f"layer1.{i}.se.weight": torch.zeros(1) for i in range(12)}
    assert "105 tensors match (89.7%); 12 unexpected: layer1.0.se.weight" in refusal(whole | more, tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    said = refusal(thin() | {"bn1.bias": torch.zeros(7)}, tmp_path)
    assert "1 of another shape: bn1.bias (7,), not (64,)" in said


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("container", ["pickle", "python 2", "zip", "legacy"])
def test_a_file_that_runs_code_when_it_is_unpickled_runs_nothing(container, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "a.pth"
    content = {"conv1.weight": Runs(mark)}
    if container == "pickle":
        file.write_bytes(pickle.dumps(content))
    elif container == "python 2":
        file.write_bytes(python2(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(UserError, match=r"a\.pth: a pickled program \(posix\.system\), whose code would run"):
        weights.read(file)
    assert not mark.exists()
    loads = (
        (lambda: pickle.loads(file.read_bytes()))
        if "p" in container[0]
        else (lambda: torch.load(file, weights_only=False))
    )
    loads()
    assert mark.exists(), "another reader runs it"


@pytest.mark.parametrize(
    "name", ["numpy.load", "numpy.core.multiarray.fromfile", "builtins.eval", "collections.Counter"]
)
def test_the_reader_of_pickled_arrays_knows_nothing_but_arrays(name, tmp_path):
    module, _, function = name.rpartition(".")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b".")
    with pytest.raises(UserError, match=name):
        weights.read(tmp_path / "a.pkl")


def test_whole_modules_and_networks_that_timm_has_not_are_explained(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "enet_b0_8.pt")
    with pytest.raises(UserError, match=r"a pickled program \(torch\.nn\.modules\..*torch.save its state_dict"):
        weights.read(tmp_path / "enet_b0_8.pt")
    said = refusal({"input_layer.0.weight": torch.zeros(1), "body.0.res_layer.0.weight": torch.zeros(1)}, tmp_path)
    assert "the IR network of face.evoLVe, which timm has no model for" in said


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"some text", b"\x80\x02]q\x01."])
def test_files_of_no_weights_are_named(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth"):
        weights.read(tmp_path / "a.pth")


def test_a_name_is_looked_for_in_the_folder_and_its_neighbours_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("REBALFER_WEIGHTS", str(tmp_path))
    weights.save(tmp_path / "my_face.safetensors", {"a": torch.ones(2)}, {"recipe": "timm", "sha256": "0"})
    assert weights.locate("my-face") == weights.locate("my_face") == tmp_path / "my_face.safetensors"
    with pytest.raises(UserError, match=r"got 'sface', expected a file or a name of .* \(my_face\)"):
        weights.locate("sface")
    with pytest.raises(UserError, match="got 'gone/my_face', expected a file"):
        weights.locate("gone/my_face")
    monkeypatch.setenv("REBALFER_WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none; `make weights` makes some"):
        weights.locate("sface")


# A run that starts from weights


@pytest.fixture
def caffe(tmp_path):
    """A file of Caffe's ResNet-50, and the flags of a run from it."""
    tensors = caffe_tensors()
    file = tmp_path / "resnet50_ft_weight.pkl"
    file.write_bytes(python2({n: t.numpy() for n, t in tensors.items()}))
    flags = ["--backbone=resnet50", f"--backbone.options={TINY}", f"--backbone.weights={file}", "--name=a"]
    flags += ["--data.train-size=16", "--data.test-size=8"]
    return file, flags


def test_a_run_needs_its_weights_once(caffe, tmp_path, capsys):
    file, flags = caffe
    assert runs.train(tmp_path, *flags, "--epochs=2") == 0
    whole = runs.state(tmp_path / "a")
    assert whole["weights"] == {"recipe": "vggface2_resnet50", "sha256": weights.digest(file)}
    assert runs.train(tmp_path, *flags, "--overwrite") == 0
    content = file.read_bytes()
    file.unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "a"), "--device=cpu"]) == 0
    said = capsys.readouterr().out
    shown = runs.rows(tmp_path / "a")[-1]["test"]
    assert f"{shown['overall']:.2f}" in said and f"{shown['mean']:.2f}" in said
    # It also resumes without the file, as if never interrupted, or with the file elsewhere.
    (tmp_path / "elsewhere").write_bytes(content)
    again = [*flags, f"--backbone.weights={tmp_path / 'elsewhere'}"]
    for flags_ in (flags, again):
        assert runs.train(tmp_path, *flags_, "--epochs=2", "--resume") == 0
        now = runs.state(tmp_path / "a")
        assert all(torch.equal(now["model"][n], t) for n, t in whole["model"].items())


def test_a_run_does_not_resume_from_other_weights(caffe, tmp_path, capsys):
    file, flags = caffe
    assert runs.train(tmp_path, *flags) == 0
    file.write_bytes(file.read_bytes() + b" ")
    for other in (flags, [f for f in flags if "weights" not in f]):
        assert runs.train(tmp_path, *other, "--epochs=2", "--resume") == 2
        assert "resume: got backbone.weights" in capsys.readouterr().err


def test_a_run_starts_from_the_backbone_of_another_run(caffe, tmp_path):
    file, flags = caffe
    assert runs.train(tmp_path, *flags) == 0
    saved = checkpoint.read(tmp_path / "a/best.pt")
    backbone = create(tmp_path / "a/best.pt", "resnet50", TINY)
    assert backbone.origin["recipe"] == "vggface2_resnet50" and backbone.std == (1 / 255,)
    state = backbone.state_dict()
    assert state.keys() == {n.removeprefix("backbone.") for n in saved["model"] if n.startswith("backbone.")}
    assert all(torch.equal(t, saved["model"][f"backbone.{n}"]) for n, t in state.items())


@torch.no_grad()
def test_synchronised_batchnorm_keeps_the_activations_inside(tmp_path):
    """timm's BatchNorm may apply one, PReLUs with weights of their own for SFace; PyTorch's conversion drops it."""
    options = dataclasses.replace(baseline(), image_size=32, backbone=Backbone("mobilenetv1_100"))
    method, images = [], torch.randn(2, 3, 32, 32)
    for synchronised in (False, True):
        compute = dataclasses.replace(options.compute, sync_batchnorm=synchronised)
        backbone = backbones.create(options, {"recipe": "sface", "sha256": ""})
        randomised(backbone)
        method.append(
            loop.build(dataclasses.replace(options, compute=compute), (3, 2), torch.device("cpu"), backbone).eval()
        )
    assert any(isinstance(module, nn.SyncBatchNorm) for module in method[1].modules())
    assert_near(method[1].backbone(images), method[0].backbone(images))


def test_the_guide_names_the_model_of_all_weights():
    guide, readme = ((ROOT / name).read_text() for name in ("docs/weights.md", "README.md"))
    for name, recipe in weights.RECIPES.items():
        if recipe.model:
            assert f"--backbone {recipe.model}" in guide, name
    commands = re.findall(r"--backbone (\w+)(?: --image-size \d+)? --backbone\.weights (\w+)", guide + readme)
    assert {name for _, name in commands} == {"sface", "mobilenet_v2", "efficientnet_lite0"}
    assert all(weights.RECIPES[name].model == model for model, name in commands)
    (swin,) = re.findall(r"`(--image-size 112 --backbone swin[^`]*)`", guide)
    config = parse(["train", *shlex.split(swin)]).config
    assert config.backbone == presets.released().backbone and config.image_size == 112
