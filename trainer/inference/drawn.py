"""Draws a prediction on its image, pixel by pixel, with every label readable."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from trainer.data.images import read_image
from trainer.inference.predictor import Prediction
from trainer.labels import Label, draw_labels
from trainer.lettering import Lettering
from trainer.sheet import style

_DOTS = 200
"""An inch."""
_LEAST, _MOST = 4.0, 16.0
"""Inches of the longer side: below texts have no room, above nobody looks."""


def draw_prediction(image: Path, prediction: Prediction, out: Path) -> str:
    """Write an image with the objects that were found on it, as PNG.

    Args:
        image: the file.
        prediction: what is said of it.
        out: the file to write; its folder exists.

    Returns:
        Letters that no font here has; they are drawn as boxes.

    Raises:
        DataError: the image has gone.
        OSError: `out` cannot be written.
    """
    kinds = {desc: n for n, desc in enumerate(dict.fromkeys(o.desc.split("/")[0] for o in prediction.objects))}
    labels = [
        Label(o.geometry, number, o.desc, kinds[o.desc.split("/")[0]]) for number, o in enumerate(prediction.objects, 1)
    ]
    letters = Lettering(label.text for label in labels)
    width, height = prediction.size
    scale = min(max(max(width, height) / _DOTS, _LEAST), _MOST) / max(width, height)  # inches a pixel
    with mpl.rc_context(style(letters)):
        figure = Figure(figsize=(width * scale, height * scale), dpi=_DOTS)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(read_image(image), extent=(0, width, height, 0), aspect="auto")
        draw_labels(axes, labels, (width * scale, height * scale), scale, letters)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        # at matplotlib's level a photo takes twice as long in all, and its file is a tenth smaller
        figure.savefig(out, format="png", pil_kwargs={"compress_level": 1})
    return letters.missing
