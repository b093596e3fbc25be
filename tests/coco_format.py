"""Any detection set written in COCO's format: pictures, train.json and test.json.

    python tests/coco_format.py voc ../shared/data OUT

Then `--dataset OUT --novel-classes bird bus cow motorbike sofa` trains a recipe on it.
"""

import json
import shutil
import sys
from pathlib import Path

from torchvision.io import write_png

from fewshot.data import detection
from fewshot.data.detection import DetectionSet


def write(dataset: DetectionSet, folder: Path) -> None:
    """The part of a set as `folder`/part.json, and its pictures in `folder`/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, record in enumerate(dataset.records):
        suffix = Path(record.path).suffix or ".png"
        name = record.id.replace("/", "_") + suffix
        if record.path:
            shutil.copy(record.path, folder / "images" / name)
        else:
            write_png(dataset.image(i), str(folder / "images" / name))
        images.append({"id": i, "file_name": name, "width": record.width, "height": record.height})
        for box, label, crowd in zip(
            record.boxes.tolist(), record.labels.tolist(), record.difficult.tolist()
        ):
            x1, y1, x2, y2 = box
            item = {
                "image_id": i,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": int(crowd),
            }
            annotations.append({"id": len(annotations) + 1, "area": (x2 - x1) * (y2 - y1), **item})
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{dataset.part}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    name, root, out = sys.argv[1:]
    for part in ("train", "test"):
        write(detection.open_detection(name, root, part=part), Path(out))
