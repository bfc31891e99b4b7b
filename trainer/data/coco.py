"""Reads COCO detection files: images, annotations and categories by their ids."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.data.annotations import Annotation, Entry, Findings, Watch, are_numbers
from trainer.data.geometry import Geometry, bounding_box
from trainer.errors import DataError

_KEYS = ("images", "annotations", "categories")


def read_coco(
    tree: dict[str, Any], source: Path, images: Path, kind: Literal["bbox", "poly"], findings: Findings, watch: Watch
) -> Iterator[Entry]:
    """Read a COCO file, image by image.

    Args:
        tree: the file as JSON: `images`, `annotations` with `bbox` (x, y, width, height in pixels), `categories`.
        source: the file; messages name it.
        images: folder that each `file_name` is looked for in.
        kind: `bbox` takes an annotation's box; `poly` its polygon, and its box where there is not exactly one polygon:
            the largest part of a thing in several parts is not the thing.
        findings: gets what cannot be an object, and images without any.
        watch: is handed the images to go over, and may show how far that has come.

    Returns:
        The entries in the order of `images`; a description is the name of the category.

    Raises:
        DataError: a list is missing, or an id is used twice.
    """
    if missing := [key for key in _KEYS if not isinstance(tree.get(key), list)]:
        raise _no_coco(source, f"no list `{missing[0]}`", f"a COCO detection file with lists {', '.join(_KEYS)}")
    names = {key: _name(category) for key, category in _by_id(tree["categories"], "categories", source).items()}
    known = _by_id(tree["images"], "images", source)
    annotations: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in tree["annotations"]:
        image = annotation.get("image_id") if isinstance(annotation, dict) else None
        if _is_id(image) and image in known:
            annotations[image].append(annotation)
        else:
            findings.left_out.add("object", "its image_id is not in `images`", _place(annotation))

    def entries() -> Iterator[Entry]:
        for image in watch(list(known.values())):
            if entry := _entry(image, annotations[image["id"]], names, images, kind, findings):
                yield entry

    return entries()


def _entry(
    image: dict[str, Any],
    annotations: list[dict[str, Any]],
    names: dict[Any, str],
    folder: Path,
    kind: Literal["bbox", "poly"],
    findings: Findings,
) -> Entry | None:
    file_name = image.get("file_name")
    place = f"image {image['id']} ({str(file_name)[:300]})"
    if not isinstance(file_name, str) or not file_name:
        findings.leave_out_record("it has no file_name", place, len(annotations))
        return None
    if not annotations:
        findings.leave_out_record("an image without annotations", place)
        return None
    read = (_annotation(each, names, kind, findings) for each in annotations)
    found = tuple(annotation for annotation in read if annotation)
    return Entry(place, (folder / file_name,), found, image.get("width"), image.get("height"))


def _annotation(
    annotation: dict[str, Any], names: dict[Any, str], kind: Literal["bbox", "poly"], findings: Findings
) -> Annotation | None:
    place, category = _place(annotation), annotation.get("category_id")
    if annotation.get("iscrowd") in (1, "1"):  # true is 1; some tools write texts
        findings.left_out.add("object", "a crowd, not one object (iscrowd)", place)
        return None
    if not _is_id(category) or category not in names:
        findings.left_out.add("object", "its category_id is not in `categories`", f"{place}: {repr(category)[:60]}")
        return None
    desc = names[category]
    geometry = _polygon(annotation.get("segmentation"), place, findings) if kind == "poly" else None
    if geometry is None and (geometry := _box(annotation.get("bbox"))) is None:
        findings.left_out.add("object", "its bbox is not four numbers x, y, width, height", place)
        return None
    if geometry.kind == "bbox_2d" and not (
        geometry.points[0] < geometry.points[2] and geometry.points[1] < geometry.points[3]
    ):
        findings.left_out.add("object", "it has no area", f"{place}: bbox {annotation['bbox']}")
        return None
    if "/" in desc:
        findings.changed.add("object", "its class is what stands before the slash in the category's name", repr(desc))
    return Annotation(place, geometry, desc)


def _box(bbox: Any) -> Geometry | None:
    if not isinstance(bbox, list) or len(bbox) != 4 or not are_numbers(bbox):
        return None
    x, y, width, height = map(float, bbox)
    return Geometry("bbox_2d", (x, y, x + width, y + height))


def _polygon(segmentation: Any, place: str, findings: Findings) -> Geometry | None:
    """The one polygon of an annotation; None, and counted, where its box must stand for it."""
    rings = segmentation if isinstance(segmentation, list) else []
    if rings and not any(isinstance(ring, list) for ring in rings):
        rings = [rings]  # x, y, x, y, ... without the list around them
    reason = "its box instead of a polygon: "
    if isinstance(segmentation, dict):
        findings.changed.add("object", reason + "it is given as a mask (RLE)", place)
    elif len(rings) > 1:
        findings.changed.add("object", reason + "it is in several parts", f"{place}: {len(rings)} polygons")
    elif not rings:
        findings.changed.add("object", reason + "it has none", place)
    elif not _is_ring(rings[0]):
        findings.changed.add("object", reason + "it is not three points or more with an area", place)
    else:
        return Geometry("poly", tuple(map(float, rings[0])))
    return None


def _is_ring(ring: Any) -> bool:
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2 or not are_numbers(ring):
        return False
    x1, y1, x2, y2 = bounding_box(ring)
    return x1 < x2 and y1 < y2


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _by_id(items: list[Any], key: str, source: Path) -> dict[Any, dict[str, Any]]:
    """`images` or `categories` by their ids."""
    found: dict[Any, dict[str, Any]] = {}
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not _is_id(item.get("id")):
            raise _no_coco(source, f"`{key}`, item {number}: no id", "a number or a text as `id` of each")
        if item["id"] in found:
            raise _no_coco(source, f"`{key}`, item {number}: id {item['id']} for the second time", "each id once")
        found[item["id"]] = item
    return found


def _name(category: dict[str, Any]) -> str:
    """A name that is no text is told where an object needs it."""
    name = category.get("name")
    return name.strip() if isinstance(name, str) else ""


def _place(annotation: Any) -> str:
    found = annotation.get("id") if isinstance(annotation, dict) else None
    return f"annotation {found}" if _is_id(found) else "an annotation without id"


def _no_coco(source: Path, got: str, allowed: str) -> DataError:
    return DataError(str(source), got, allowed, "correct the file, or name another format with --format")
