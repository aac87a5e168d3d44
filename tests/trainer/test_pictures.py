"""What the pictures say: numbers, titles, colours and letters, read from matplotlib's objects."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support import runs

from trainer import figures, metrics
from trainer.data import Split

CLASSES = ("surprise", "fear", "happiness")
GREY = 100  # of the images below, in all colours


@pytest.fixture
def figure(monkeypatch):
    """Calls a function of figures and returns the figure that it would save."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    families = list(matplotlib.rcParams["font.family"])

    def call(function, *arguments):
        function(*arguments)
        return drawn.pop()

    yield call
    matplotlib.rcParams["font.family"] = families


def texts(axes):
    return {text.get_text(): text for text in axes.texts}


# confusion.png


def test_the_numbers_of_the_matrix_are_drawn(figure):
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    axes, bar = figure(figures.confusion_matrix, "a.png", matrix, CLASSES, "run a, epoch 7", "test").axes
    drawn = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axes.texts}
    expected = [["75", "25", "0"], ["0", "0", "0"], ["25", "25", "50"]]  # percent of each row
    assert drawn == {(i, j): expected[i][j] for i in range(3) for j in range(3)}
    assert axes.images[0].get_array().tolist() == [[75, 25, 0], [0, 0, 0], [25, 25, 50]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["surprise (4)", "fear (0)", "happiness (8)"]
    assert [t.get_text() for t in axes.get_xticklabels()] == list(CLASSES)
    assert "%" in bar.get_ylabel() and "test" in axes.get_ylabel()


def test_the_matrix_says_run_epoch_split_and_accuracies(figure):
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    axes, _ = figure(figures.confusion_matrix, "a.png", matrix, CLASSES, "run a, epoch 7", "test").axes
    overall, mean = 100 * 7 / 12, (75 + 50) / 2
    assert axes.get_title() == f"run a, epoch 7\ntest: overall {overall:.2f} %, mean {mean:.2f} %"


# cam.png


def drawn_maps(labels, predicted, classes=CLASSES, maps=None):
    """The axes of the picture of two images whose right half is bright, and those of its colour bar."""
    images = torch.full((2, 32, 32, 1), GREY, dtype=torch.uint8)
    maps = torch.zeros(4, 3, 4, 4) if maps is None else maps
    axes, bar = figures._drawn_maps(images, maps, labels, predicted, classes).axes
    return axes, bar


def test_a_wrong_prediction_is_red_and_a_right_one_green():
    axes, _ = drawn_maps([0, 1], [0, 2, 0, 1])
    found = [(t.get_text(), t.get_color()) for t in axes.texts if t.get_text().startswith("→")]
    assert found == [
        ("→ surprise", "tab:green"),
        ("→ happiness", "tab:red"),  # fear
        ("→ surprise", "tab:green"),
        ("→ fear", "tab:green"),
    ]
    axes, _ = drawn_maps(None, [0, 2, 0, 1])  # not known: neither
    assert {t.get_color() for t in axes.texts} == {"black"} and not axes.patches


def test_the_true_class_is_framed_in_its_row():
    axes, _ = drawn_maps([0, 2], [0, 2, 0, 2])
    heads = {name: [t for t in axes.texts if t.get_text() == name and not t.get_rotation()] for name in CLASSES}
    for frame, name in zip(axes.patches, ["surprise", "happiness"] * 2, strict=True):
        centre = frame.get_x() + frame.get_width() / 2
        assert min(abs(head.get_position()[0] - centre) for head in heads[name]) < 1
    rows = [frame.get_y() for frame in axes.patches]
    assert rows[0] == rows[2] < rows[1] == rows[3]
    left = {t.get_text(): t.get_position()[1] for t in axes.texts if t.get_rotation() == 90}
    assert list(left) == ["surprise", "happiness"]
    assert rows[0] < left["surprise"] < rows[1] < left["happiness"]


def test_the_overlay_is_on_grey_red_is_evidence_and_all_tiles_share_a_scale():
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    images[..., 0] = 240  # a red image: none of its colour may be seen under a map
    maps = torch.zeros(2, 3, 4, 4)
    maps[0, 1], maps[1, 2] = 2.0, -1.0
    axes, bar = figures._drawn_maps(images, maps, [0], [0, 0], CLASSES).axes
    assert bar.get_ylim() == (-2, 2) and bar.get_ylabel() == "evidence for the class"
    picture = axes.images[0].get_array()
    tiles = [picture[-16, column * 34 + 16].astype(int) for column in range(8)]
    assert tiles[0].tolist() == tiles[4].tolist() == [240, 0, 0]
    colour = {v: 255 * np.array(matplotlib.colormaps["RdBu_r"]((v + 2) / 4)[:3]) for v in (-1, 0, 2)}
    for column, value in ((1, 0), (2, 2), (3, 0), (5, 0), (6, 0), (7, -1)):
        assert np.abs(tiles[column] - (0.4 * 80 + 0.6 * colour[value])).max() <= 1
    assert tiles[2][0] > tiles[2][2] + 30 and tiles[7][2] > tiles[7][0] + 30  # red for evidence, blue against


def test_the_mirror_image_is_in_the_right_half_with_its_own_maps():
    images = torch.zeros(1, 32, 32, 1, dtype=torch.uint8)
    images[:, :, 16:] = 200
    maps = torch.zeros(2, 3, 4, 4)
    maps[0, 0, :, 0], maps[1, 0, :, 3] = 1.0, 1.0
    axes, _ = figures._drawn_maps(images, maps, [0], [0, 0], CLASSES).axes
    picture = axes.images[0].get_array().astype(int)
    image, twin = picture[-16, 0:32], picture[-16, 4 * 34 : 4 * 34 + 32]
    assert image[:, 0].tolist() == twin[::-1, 0].tolist() and image[0, 0] == 0 and image[31, 0] == 200
    of_image, of_twin = picture[-16, 34 : 34 + 32], picture[-16, 5 * 34 : 5 * 34 + 32]
    assert of_image[::-1].tolist() == of_twin.tolist() and np.ptp(of_image[:, 2]) > 50


def test_the_maps_and_predictions_drawn_are_those_of_the_method(figure, finished, monkeypatch):
    from trainer import commands, data

    trained = commands.load(str(finished), "cpu")
    images, labels = data.prepare(trained.config).splits["test"].one_of_each()
    seen, draw = {}, figures._drawn_maps

    def drawn(images, maps, labels, predicted, classes):
        seen.update(maps=maps, labels=labels, predicted=predicted)
        return draw(images, maps, labels, predicted, classes)

    monkeypatch.setattr(figures, "_drawn_maps", drawn)
    picture = figure(figures.activation_maps, "a.png", trained.method, images, labels, trained.classes, "run a")
    assert picture.get_suptitle().startswith("run a\nclass activation maps")
    with torch.no_grad():
        for i, at in enumerate((images, images.flip(2))):
            features = trained.method.backbone(at.permute(0, 3, 1, 2).float() / 127.5 - 1)
            expected = torch.einsum("lc,mchw->mlhw", trained.method.head.weight, features)
            torch.testing.assert_close(seen["maps"].chunk(2)[i], expected, rtol=1e-4, atol=1e-5)
            logits = expected.mean((2, 3)) + trained.method.head.bias
            assert seen["predicted"][7 * i : 7 * i + 7] == logits.argmax(1).tolist()
    assert seen["labels"] == list(range(7))


# Names


def test_letters_of_any_script_are_drawn_or_numbered():
    names = ("angry", "Злость", "开心", "غضب", "🙂")
    for i, (name, shown) in enumerate(zip(names, figures.legible(names), strict=True)):
        if shown == name:
            families = matplotlib.rcParams["font.family"]
            assert any(figures._has(family, name) for family in families)
        else:
            assert shown == f"class {i}"
            assert not any(figures._has(family, name) for family in figures._other_fonts())
    assert figures.legible(names)[:2] == names[:2]  # matplotlib's own font has these


@pytest.mark.filterwarnings("error:Glyph")
def test_no_box_is_drawn_in_place_of_a_letter(tmp_path):
    names = ("开心", "تعجب", "fear")
    figures.confusion_matrix(tmp_path / "a.png", torch.eye(3).long(), names, "a", "test")
    images, maps = torch.zeros(1, 32, 32, 1).byte(), torch.zeros(2, 3, 2, 2)
    figures.save(figures._drawn_maps(images, maps, [0], [0, 1], figures.legible(names)), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100


# The pictures of a run


def test_one_image_of_each_class():
    split = Split(torch.arange(5).byte().view(5, 1, 1, 1), torch.tensor([2, 0, 2, 1, 0]))
    images, labels = split.one_of_each()
    assert labels == [0, 1, 2] and images.flatten().tolist() == [1, 3, 0]
    images, labels = split.one_of_each([2, 0])
    assert labels == [0, 2] and images.flatten().tolist() == [1, 0]


def test_a_finished_run_has_a_picture_of_its_last_epoch_on_the_test_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "confusion_matrix", lambda *a: seen.append(a))
    monkeypatch.setattr(figures, "activation_maps", lambda *a: seen.append(a))
    assert runs.train(tmp_path, "--name=a", "--output.pictures", "--epochs=2") == 0
    (path, matrix, classes, title, split), (other, _, images, labels, *_, about) = seen
    assert (path, other) == (tmp_path / "a/confusion.png", tmp_path / "a/cam.png")
    assert (title, split, about) == ("a, epoch 2", "test", "a, epoch 2, test images")
    assert metrics.accuracies(matrix) == runs.rows(tmp_path / "a")[-1]["test"]
    assert labels == list(range(7)) and len(images) == 7 and classes[0] == "surprise"
