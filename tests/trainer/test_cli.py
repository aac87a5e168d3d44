"""The command line: what it offers, what it refuses, and which of two values counts."""

import dataclasses
import json
import os
import shutil
import tomllib

import pytest
import torch
import yaml
from PIL import Image
from support import child, runs

from trainer import backbones, compute, presets
from trainer.__main__ import main, parse
from trainer.config import PACKAGES, Checked, UserError, as_dict, flags, found, from_dict, without_effect
from trainer.data import synthetic
from trainer.methods import Task
from trainer.methods.tables import TableMethod

NAMES = [(kind, name) for kind, package in PACKAGES.items() for name in found(package)]


def refusal(capsys, *arguments, status=2):
    """The one line with which the command line refuses ``arguments``."""
    capsys.readouterr()
    assert main(list(arguments)) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


def file_of(folder, values, suffix):
    path = folder / f"options{suffix}"
    if suffix == ".toml":
        lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if not isinstance(v, dict)]
        for group, inner in values.items():
            if isinstance(inner, dict):
                lines += [f"[{group}]", *(f"{k} = {json.dumps(v)}" for k, v in inner.items())]
        assert tomllib.loads("\n".join(lines)) == values
        path.write_text("\n".join(lines))
    else:
        path.write_text(yaml.safe_dump(values) if suffix == ".yaml" else json.dumps(values))
    return f"--config={path}"


# Help


def test_the_commands_are_those_with_a_file_and_each_has_a_line(capsys):
    assert set(found("commands")) >= {"cams", "demo", "evaluate", "export", "predict", "train"}
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        for name, options in found("commands").items():
            line = next(line for line in shown.splitlines() if line.split()[:1] == [name.replace("_", "-")])
            assert line.endswith(f"  {options.__doc__.splitlines()[0]}")


@pytest.mark.parametrize("command", found("commands"))
def test_help_names_every_option_on_one_screen(command, capsys):
    chosen = NAMES if command == "train" else [("method", "rebalanced")]
    for kind, name in chosen:
        extra = [f"--{kind}={name}"] if command == "train" else []
        assert main([command, "--help", *extra]) == 0
        shown = capsys.readouterr().out
        lines = shown.splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 120
        assert main([command, "--help", "all", *extra]) == 0
        everything = capsys.readouterr().out
        assert max(map(len, everything.splitlines())) <= 120
        default = dataclasses.replace(found("commands")[command]())
        if command == "train":
            default = parse(["train", *extra])
        for flag in flags(default):
            place, key = flag.metadata.get("positional"), flag.key.removesuffix(".name")
            named = flag.key.upper() if place else f"--{'[no-]' if flag.kind is bool and flag.value else ''}{key}"
            line = next(line for line in everything.splitlines() if line.split()[:1] == [named])
            named_by_file = flag.key in [f"{kind}.name" for kind in PACKAGES]  # which fill several lines
            assert ("one of " if named_by_file else flag.metadata["help"]) in line
            # In the short help it has the same line, or a place in the line of its group.
            rest = shown.partition(f"\n  {flag.key.rpartition('.')[0]}:")[2].partition(":")[0]
            assert line in lines or flag.key.rpartition(".")[2] in rest


def test_help_has_what_stands_for_itself_first(capsys):
    for command, names in (("predict", ["CHECKPOINT", "IMAGES"]), ("align", ["SOURCE", "OUT"])):
        main([command, "--help"])
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in shown[3:5]] == names and f"{command} {' '.join(names)} [" in shown[0]


def test_help_has_the_groups_that_matter_first_and_names_the_others(capsys):
    main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    order = [
        lines.index(found(p)[n].__doc__.splitlines()[0]) for p, n in (("methods", "rebalanced"), ("data", "synthetic"))
    ]
    more = lines.index("more, each with --help GROUP, or --help all:")
    assert next(i for i, line in enumerate(lines) if "--preset" in line) < order[0] < order[1] < more
    assert [line.split(":")[0].strip() for line in lines[more + 1 : -2] if ":" in line] == [
        f.name
        for f in dataclasses.fields(presets.paper())
        if dataclasses.is_dataclass(getattr(presets.paper(), f.name))
    ][2:]
    main(["train", "--help", "optim"])
    shown = capsys.readouterr().out
    assert "--optim.weight_decay FLOAT" in shown and "--method" not in shown
    assert refusal(capsys, "train", "--help", "optm").startswith("help: got 'optm', expected one of all, method, data")


def test_a_hyphen_in_a_name_is_an_underscore(tmp_path):
    (tmp_path / "a.yaml").write_text("method: {name: logit-adjust, tau: 0.5}\ndata: raf-db")
    for arguments in (
        ["--method=logit-adjust", "--method.tau=0.5", "--data", "raf-db"],
        ["--method.name", "logit_adjust", "--method.tau=0.5", "--data=raf_db"],
        [f"--config={tmp_path}/a.yaml"],
    ):
        config = parse(["train", *arguments]).config
        assert (config.method.name, config.method.tau, config.data.name) == ("logit_adjust", 0.5, "raf_db")


# What is refused


def test_limits_and_choices_are_checked_wherever_an_option_has_them():
    for options in (o for package in ("commands", *PACKAGES.values()) for o in found(package).values()):
        limited = [f.name for f in dataclasses.fields(options) if f.metadata.keys() & {"low", "high", "choices"}]
        assert not limited or issubclass(options, Checked), (options, limited)


@pytest.mark.parametrize(
    "flag, key, near",
    [
        ("--epoch=2", "epoch", "epochs"),
        ("--epoch 2", "epoch", "epochs"),
        ("--optim.decai=1", "optim.decai", "optim.decay"),
        ("--decay=1", "decay", "optim.decay"),
        ("--no-output.picture", "no_output.picture", "output.pictures"),
        ("--learning=1", "learning", None),  # an abbreviation of learning_rate
        ("--method.bta=0.5", "method.bta", "method.beta"),
        ("--backbone.options.img_size=3", "backbone.options.img_size", "image_size"),
    ],
)
def test_a_misspelt_or_shortened_flag_is_named_with_a_suggestion(flag, key, near, capsys):
    error = refusal(capsys, "train", *flag.split())
    assert error.startswith(f"{key}: got an option that ")
    assert near is None or error.endswith(f"did you mean {near}?")


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
def test_a_misspelt_key_of_a_file_is_named_with_a_suggestion(suffix, tmp_path, capsys):
    for values, key, near in (
        ({"epoch": 2}, "epoch", "epochs"),
        ({"epochs": 2, "optim": {"clip": 1.0, "decai": 1}}, "optim.decai", "optim.decay"),
        ({"method": {"name": "cb", "bta": 0.5}}, "method.bta", "method.beta"),
        ({"batch-size": 2}, "batch-size", "batch_size"),
    ):
        error = refusal(capsys, "train", file_of(tmp_path, values, suffix))
        assert error.startswith(f"{key}: got an option that ") and error.endswith(f"did you mean {near}?")


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim: adam", "optim: got 'adam' in .*, expected options by name"),
        ("method: 3", "method: got 3 in .*, expected options by name"),
        ("a: b: c", "config: got .*, which is neither YAML nor TOML"),
        ("- 1", "config: got .*, expected a file of options, such as 'epochs: 10'"),
        ("", "config: got .*, expected a file of options"),
        ("epochs: x", "epochs: got 'x', expected a whole number"),
        ("optim: {decay: x}", "optim.decay: got 'x', expected a finite number"),
        ("method: {name: cbx}", "method: got 'cbx', expected one of baseline, bbn, cb"),
    ],
)
def test_a_file_that_says_something_else_is_named(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse(["train", "--config", str(tmp_path / "a.yaml")])


def test_a_file_that_is_missing_or_no_file_is_named(tmp_path, capsys):
    assert refusal(capsys, "train", f"--config={tmp_path}/none") == (
        f"config: got '{tmp_path}/none', which can't be read: No such file or directory"
    )
    assert refusal(capsys, "train", "--config", str(tmp_path)).endswith("Is a directory")
    assert refusal(capsys, "evaluate", "run", "--config=x").startswith("config: got an option that this command")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--learning-rate=inf", "learning_rate: got 'inf', expected a finite number"),
        ("--learning-rate=nan", "learning_rate: got 'nan', expected a finite number"),
        ("--learning-rate=0", "learning_rate: got 0.0, expected a finite number > 0"),
        ("--optim.decay=5", "optim.decay: got 5.0, expected a finite number > 0 and <= 1"),
        ("--optim.weight-decay=-1", "optim.weight_decay: got -1.0, expected a finite number >= 0"),
        (f"--seed={2**63}", f"seed: got {2**63}, expected a finite number >= 0 and <= 9.22337e+18"),
        ("--seed=-1", "seed: got -1, expected"),
        ("--batch-size=0", "batch_size: got 0, expected a finite number >= 1"),
        ("--epochs=0", "epochs: got 0, expected a finite number >= 1"),
        ("--epochs=1.5", "epochs: got '1.5', expected a whole number"),
        ("--epochs", "epochs: got '', expected a whole number"),
        ("--image-size=0", "image_size: got 0, expected"),
        ("--split.hold-out=1", "split.hold_out: got 1.0, expected a finite number > 0 and <= 0.9"),
        ("--split.imbalance=0.5", "split.imbalance: got 0.5, expected a finite number >= 1"),
        ("--method.alpha=2", "method.alpha: got 2.0, expected a finite number >= 0 and <= 1"),
        ("--method.alpha=x", "method.alpha: got 'x', expected a finite number or null"),
        ("--method.beta=1", "method.beta: got 1.0, expected a finite number >= 0 and <= 1"),
        ("--optim.average=1", "optim.average: got 1.0, expected a finite number >= 0 and <= 1"),
        ("--data.train-size=0", "data.train_size: got 0, expected"),
        ("--output.save-minutes=-1", "output.save_minutes: got -1.0, expected"),
        ("--output.pictures=maybe", "output.pictures: got 'maybe', expected true or false"),
        ("--backbone.options=3", "backbone.options: got '3', expected values by name, such as '{a: 1}'"),
        ("--optim.schedule=cosin", "optim.schedule: got 'cosin', expected exponential or cosine or constant"),
        ("--compute.device=tpu", "compute.device: got 'tpu', expected auto or cpu or cuda"),
        ("--name=a/b", "name: got 'a/b', expected the name of one folder"),
        ("--name=..", "name: got '..', expected the name of one folder"),
        ("--method=cbx", "method: got 'cbx', expected one of baseline, bbn, cb, "),
        ("--data=mnist", "data: got 'mnist', expected one of affectnet, "),
        ("--preset=papre", "preset: got 'papre', expected one of paper, released, eac, cb, baseline, adjusted, demo"),
        ("extra", "unrecognized arguments: extra"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_named(flag, message, capsys):
    assert refusal(capsys, "train", flag).startswith(message)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optim": {"schedule": "cosin"}}, "optim.schedule: got 'cosin', expected exponential or cosine or constant"),
        ({"optim": {"clip": "5"}}, "optim.clip: got '5', expected a finite number >= 0"),
        ({"backbone": {"frozen_batchnorm": "false"}}, "backbone.frozen_batchnorm: got 'false', expected true or false"),
        ({"epochs": 1.5}, "epochs: got 1.5, expected a whole number"),
        ({"optim": {"accumulate": True}}, "optim.accumulate: got True, expected a whole number"),
        ({"optim": {"decai": 1}}, "optim.decai: got an unknown option, expected one of accumulate, average, "),
        ({"optim": 3}, "optim: got 3, expected options by name"),
        ({"method": {"name": "cb", "loss": "hinge"}}, "method.loss: got 'hinge', expected softmax or focal or sigmoid"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_where_no_command_line_reads_it(values, message):
    """As in a study's file."""
    with pytest.raises(UserError, match=message):
        from_dict(values, presets.paper())


def test_other_commands_name_what_is_wrong_too(capsys):
    assert refusal(capsys, "trian") == (
        f"command: got 'trian', expected one of {', '.join(found('commands'))}; did you mean train?"
    )
    assert refusal(capsys, "predict", "run").endswith("required: images")
    for command in (["evaluate", "run"], ["predict", "run", "a.png"], ["cams", "run", "a.png"]):
        assert refusal(capsys, *command, "--device=tpu") == "device: got 'tpu', expected auto or cpu or cuda"
    assert refusal(capsys, "demo", "--epoch=3").endswith("did you mean epochs?")
    assert refusal(capsys, "demo", "--epochs=0").startswith("epochs: got 0")
    assert refusal(capsys, "cams", "run", "out", "--classes=fear") == (
        "classes: got 'fear', expected a list, such as '[a, b]'"
    )
    assert refusal(capsys, "predict", "run", "a", "--out=a.txt").startswith("out: got 'a.txt', expected a name that")


def test_an_option_of_another_method_or_data_set_is_named(capsys):
    assert refusal(capsys, "train", "--method=baseline", "--method.alpha=0.2") == (
        "method.alpha: got an option that method baseline does not have, expected one of method.name"
    )
    assert refusal(capsys, "train", "--data.path=/faces").startswith(
        "data.path: got an option that data synthetic does not have, expected one of data.name, data.train_size"
    )
    assert refusal(capsys, "train", "--method.convention=released", "--method.beta=0.5").startswith(
        "method.beta: got 0.5, which has no effect"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ("--backbone=resnet17", "backbone: got 'resnet17', expected a model of timm"),
        (
            "--backbone=convnext_atto --backbone.options={}",
            "backbone: got 'convnext_atto', expected a model with exact class activation maps, such as resnet18",
        ),
        ('--backbone.options={"drop_rate":0.1}', "backbone.options: got drop_rate, which has no effect"),
        (
            '--backbone.options={"drop_path":"x"}',
            "backbone.options: got {'drop_path': 'x'} for 'resnet10t'",
        ),
        ("--compute.backend=cuda11", "compute.backend: got 'cuda11', expected one of "),
        ("--optim.optimizer=adan2", "optim.optimizer: got 'adan2', expected adam, adamw, sgd or another one of timm"),
        ('--optim.options={"momentums":1}', "optim.options: got {'momentums': 1} for 'adam'"),
        ("--compute.cuda-graph", "compute.cuda_graph: got True, expected a GPU: this run uses the CPU"),
        ("--batch-size=1", "batch_size: got 1, expected at least 2: the last map of 'resnet10t' is a single pixel"),
        ("--resume", "resume: got "),
        ("--resume --overwrite", "resume: got both --resume and --overwrite, expected one of them"),
        ("--name=one", "name: got 'one', expected another one, --resume or --overwrite: "),
        ("--method=baseline --backbone.separate_views", "backbone.separate_views: got true, but baseline looks at one"),
        ("--augment.versions=2", "augment.versions: got 2, expected backbone.train_from too"),
        ("--split.folds=2 --split.groups=nowhere.csv", "split.groups: got nowhere.csv, which can't be read"),
        ("--compute.threads=5000", "compute.threads: got 5000, expected a finite number >= 0 and <= 1024"),
    ],
)
def test_options_folder_backend_and_backbone_are_checked_first(options, message, root, capsys, monkeypatch):
    """Before an image is read."""
    monkeypatch.setattr(synthetic.Options, "read", lambda *_: pytest.fail("images were read"))
    before = sorted(root.rglob("*"))
    capsys.readouterr()
    assert runs.train(root, "--name=bad", *options.split()) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before  # no folder is left behind


def test_a_gpu_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = dataclasses.replace(presets.paper().compute, device="cuda")
    with pytest.raises(UserError, match="compute.device: got 'cuda', expected 'cpu' or 'auto': PyTorch sees no CUDA"):
        compute.device_of(options)


def test_a_backend_of_the_environment_is_named_as_such(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REBALFER_BACKEND", "cuda11")
    error = refusal(capsys, "train", f"--output.root={tmp_path}", "--compute.device=cpu")
    assert error.startswith("REBALFER_BACKEND: got 'cuda11', expected one of ")


def test_too_little_memory_is_one_line(tmp_path, capsys, monkeypatch):
    flags = ["train", f"--output.root={tmp_path}", "--compute.device=cpu", "--compute.backend=reference"]
    said = "batch_size or image_size: too large for the memory: "
    assert refusal(capsys, *flags, f"--image-size={10**7}").startswith(f"{said}[enforce fail at alloc_cpu.cpp")

    def failing(*_, **__):
        raise problem

    monkeypatch.setattr(compute.rk, "attention_consistency", failing)
    for problem in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("Unable to allocate 7 PiB"),
        MemoryError(),
    ):
        assert refusal(capsys, *flags).startswith(f"{said}{str(problem) or 'MemoryError'}")
    for text in ("REBALFER_CPU_ISA: got 'foo', expected one of this CPU's: avx2", "backend: 'cuda' cannot serve"):
        problem = RuntimeError(f"operator(), csrc/cpu/ops.cpp:70, {text}")
        assert refusal(capsys, *flags).endswith(text)
    problem = RuntimeError("an error of the program")
    with pytest.raises(RuntimeError, match="an error of the program"):  # which keeps its traceback
        main(flags)


def test_options_that_do_nothing_are_said(tmp_path, caplog):
    runs.train(tmp_path, "--optim.schedule=constant", "--optim.decay=0.5", "--augment.erase-largest=0.5")
    for line in (
        "optim.decay 0.5 has no effect with optim.schedule constant",
        "augment.erase_largest 0.5 has no effect",
    ):
        assert line in caplog.text


@pytest.mark.parametrize(
    "flags, lines",
    [
        ("", []),
        ("--split.hold_out=0.3", []),
        ("--split.hold_out=0.3 --split.choose_on=test", ["split.hold_out 0.3 has no effect with split.choose_on test"]),
        (
            "--backbone.separate_views --backbone.frozen_batchnorm",
            ["backbone.separate_views True has no effect with backbone.frozen_batchnorm"],
        ),
        (
            "--augment.versions=1 --augment.flip=0 --augment.noise=3",
            [f"augment.{x} has no effect with augment.versions 1" for x in ("flip 0.0", "noise 3.0")],
        ),
        ("--augment.shift=0.1 --augment.crop=0.5", ["augment.shift 0.1 has no effect with augment.crop"]),
        ("--split.fold=0 --augment.noise_probability=0.1", [
            "augment.noise_probability 0.1 has no effect without augment.noise",
        ]),
    ],
)  # fmt: skip
def test_each_option_that_does_nothing_has_a_line(flags, lines):
    assert without_effect(config_of(*flags.split())) == lines


@pytest.mark.parametrize("text, value", [("false", False), ("true", True)])
def test_a_switch_may_be_followed_by_its_value(text, value):
    assert config_of("--optim.decay_all", text, "--epochs", "3").optim.decay_all is value
    assert config_of("--compute.compile", text).compute.compile is value


# Which value counts


def config_of(*arguments):
    return parse(["train", *arguments]).config


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
def test_a_flag_counts_over_a_file_and_a_file_over_the_preset(suffix, tmp_path):
    values = {"preset": "released", "epochs": 7, "method": {"name": "cb", "beta": 0.5}, "optim": {"clip": 2.0}}
    config = config_of(file_of(tmp_path, values, suffix), "--epochs=3", "--optim.warmup-steps=5")
    assert (config.epochs, config.optim.clip, config.optim.warmup_steps) == (3, 2.0, 5)
    assert (config.method.name, config.method.beta) == ("cb", 0.5)
    assert (config.optim.optimizer, config.image_size) == ("adamw", 112)  # the preset's
    assert config_of(file_of(tmp_path, values, suffix), "--preset=demo").backbone.name == "resnet10t"


def test_the_later_of_two_files_and_of_two_flags_counts(tmp_path):
    for name, text in (("a", "epochs: 5\nseed: 1\nmethod: eac"), ("b", "epochs: 6\nmethod: cb")):
        (tmp_path / name).write_text(text)
    config = config_of(f"--config={tmp_path}/a", "--config", f"{tmp_path}/b", "--image-size=64", "--image_size", "48")
    assert (config.epochs, config.seed, config.method.name, config.image_size) == (6, 1, "cb", 48)


def test_a_file_that_can_be_read_only_once_is_read_once():
    """Such as <(command) of a shell."""
    end, start = os.pipe()
    os.write(start, b"epochs: 5\nmethod: cb")
    os.close(start)
    config = config_of(f"--config=/dev/fd/{end}")
    os.close(end)
    assert (config.epochs, config.method.name) == (5, "cb")


def test_empty_groups_and_null_say_nothing_and_none(tmp_path):
    (tmp_path / "a.yaml").write_text("method:\noptim:\ncompute: {backend: null}\n")
    assert config_of(f"--config={tmp_path}/a.yaml") == presets.paper()
    assert config_of("--compute.backend=cpu", "--compute.backend=null").compute.backend is None


def test_a_runs_stored_config_gives_the_same_config(finished, tmp_path):
    config = config_of("--config", str(finished / "config.json"))
    assert as_dict(config) == runs.checkpoint.read(finished / "last.pt")["config"]
    options = ["--data=imagefolder", "--data.path=~/a b", "--data.classes={suprise: surprise, unknown: null}"]
    for preset in presets.found():
        config = config_of(f"--preset={preset}", "--optim.options={betas: [0.9, 0.95]}", *options)
        assert config.data.classes == {"suprise": "surprise", "unknown": None}
        path = tmp_path / f"{preset}.json"
        path.write_text(json.dumps(as_dict(config)))
        assert config_of(f"--config={path}") == config


@pytest.mark.parametrize("command", found("commands"))
def test_switches_can_be_set_both_ways(command):
    options = list(flags(found("commands")[command]()))
    switches = [flag.key for flag in options if flag.kind is bool]
    places = ["a.onnx" for flag in options if flag.metadata.get("positional")]
    assert switches
    for pattern, expected in (
        ("--{}", True),
        ("--{}=true", True),
        ("--{}=True", True),
        ("--no-{}", False),
        ("--no_{}", False),
        ("--{}=false", False),
        ("--{}=False", False),
    ):
        for key in (str, lambda k: k.replace("_", "-")):
            options = parse([command, *(pattern.format(key(switch)) for switch in switches), *places])
            assert [flag.value for flag in flags(options) if flag.key in switches] == [expected] * len(switches)


def test_home_is_expanded_in_every_path(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REBALFER_BACKEND", "reference")  # the cache of the others is in the home that was left
    shutil.copytree(finished, tmp_path / "runs/one")
    (tmp_path / "options.yaml").write_text("name: two")
    (tmp_path / "empty").mkdir()
    Image.new("L", (40, 40), 99).save(tmp_path / "face.png")
    assert main(["train", *runs.FLAGS, "--config=~/options.yaml", "--output.root=~/runs"]) == 0
    assert (tmp_path / "runs/two/last.pt").is_file()
    device = "--device=cpu"
    assert main(["evaluate", "~/runs/one", "--out=~/scores.json", device]) == 0
    assert main(["predict", "~/runs/one/last.pt", "~/face.png", "--out=~/a.csv", "--maps=~/maps", device]) == 0
    assert main(["cams", "~/runs/one", "~/again.png", "--classes=[fear]", device]) == 0
    for name in ("scores.json", "a.csv", "maps/00000-face.png", "again.png"):
        assert (tmp_path / name).is_file()
    for options in found("data").values():
        if hasattr(options, "path"):
            with pytest.raises(UserError, match="data.path: got .*, which holds no"):
                options(path="~/empty").read(32, 0)


# Presets, in the numbers of the paper and of the programs that its authors released


def recipe(config):
    optim = config.optim
    return (
        config.backbone.name, config.image_size, config.epochs, config.batch_size, optim.optimizer,
        config.learning_rate, optim.weight_decay, optim.schedule, optim.schedule_by, optim.decay,
    )  # fmt: skip


def built(config):
    """Its method on a backbone that is as wide as it needs to be."""
    small = dataclasses.replace(config, image_size=32, backbone=dataclasses.replace(
        config.backbone, name="resnet10t", options=runs.TINY
    ))  # fmt: skip
    method = config.method.build(backbones.create(small), Task((9, 3, 4, 8, 5, 6, 7)))
    assert isinstance(method, TableMethod)
    return method


PAPER = ("resnet18", 224, 60, 32, "adam", 1e-4, 1e-4, "exponential", "epoch", 0.9)


def test_the_paper_and_what_it_compares_with_share_a_recipe():
    for name in ("paper", "cb", "baseline"):
        config = config_of(f"--preset={name}")
        assert recipe(config) == PAPER and config.split.choose_on == "held-out"
        assert config.method.name == {"paper": "rebalanced"}.get(name, name)
    method = built(presets.paper())
    assert (method.consistency_weight, method.views) == (2.0, "both")
    assert presets.cb().method.beta == presets.paper().method.beta == 0.9999
    target = method.head.target_table
    assert target.diag().max() > 0.9 and target.sum(1).tolist() == pytest.approx([1] * 7)  # alpha = 0.1 is shared out
    assert (1 - target.sum() / 7).abs() < 1e-6 and (
        target[0, 1] - 0.1 * method.head.map_weights[1] ** 2 / 7
    ).abs() < 1e-6


def test_the_released_program():
    config = config_of("--preset=released")
    assert recipe(config) == (
        "swin_tiny_patch4_window7_224", 112, 156, 32, "adamw", 5e-4 * 32 / 512, 0.05, "cosine", "step", 0.9
    )  # fmt: skip
    assert config.epochs * -(-12271 // 32) == pytest.approx(60_000, rel=0.01)
    assert config.backbone.options == {"img_size": 112, "patch_size": 2}
    assert (config.optim.warmup_steps, config.optim.clip, config.compute.amp) == (2000, 5.0, "fp16")
    assert config.augment.erase == 0.25
    method = built(config)
    assert (method.consistency_weight, method.views) == (0.1, "original")
    assert method.head.target_table.diag().tolist() == pytest.approx([0.7] * 7)
    assert "RandAugment" in presets.released.__doc__  # what it leaves out


def test_eac():
    config = config_of("--preset=eac")
    assert recipe(config) == (*PAPER[:5], 2e-4, *PAPER[6:])
    method = built(config)
    assert (method.consistency_weight, method.views) == (5.0, "original")
    assert method.head.map_weights.tolist() == [1.0] * 7
    augment = config.augment
    assert (augment.erase, augment.erase_largest) == (0.5, 0.25)
    assert (augment.noise, augment.noise_probability) == (pytest.approx(30**0.5), 0.5)


def test_the_demo_is_small():
    config = config_of("--preset=demo")
    assert config.epochs * config.data.train_size * config.image_size**2 < 60 * 12271 * 224**2 / 100


# What it needs


def test_the_loop_needs_no_jsonargparse_and_the_command_line_says_so(tmp_path):
    code = """
import sys
sys.modules["jsonargparse"] = None
from support import runs
import trainer.loop
from trainer import commands, presets
from trainer.train import train
print(runs.main(["train"]))
"""
    done = child.run("-c", code, PYTHONPATH="tests", OMP_NUM_THREADS="1", cwd=child.ROOT)
    assert done.stdout.splitlines() == ["2"], done.stderr
    assert done.stderr == "error: command: needs packages that are not installed: pip install jsonargparse\n"
