"""Where no ImageNet weights are to be had: a trunk first learns to name the objects that it will
look for.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision import ops
from tqdm.auto import tqdm

from fewshot.backbones.trunks import C4
from fewshot.data.detection import DetectionSet
from fewshot.data.pipeline import Pipeline, train_loader
from fewshot.data.stream import Feed, Word
from fewshot.detectors import faster_rcnn
from fewshot.training import launch
from fewshot.training.run import Schedule

# boxes around each object, and anywhere on a picture, that are classified besides the objects
NEAR, FAR = 8, 16
ROIS = 32  # of them that are trained on, per picture


def name_objects(
    accelerator: Accelerator,
    trunk: C4,
    train_set: DetectionSet,
    pipeline: Pipeline,
    *,
    seed: int,
    steps: int,
    lr: float = 0.04,
    batch_size: int = 8,
    workers: int = 0,
) -> None:
    """Train a trunk, stage 4 included, to name what is in boxes on and near the objects of a set,
    or background.

    This is what ImageNet is to the published trunks. A detector that compares asks only whether two
    objects are alike, of which a network of random weights learns little in many steps. It is the
    second stage of a Faster R-CNN, given proposals; its last layers are thrown away. Every process
    does the same work and ends with the same weights. Call it before `accelerator.prepare`.

    Args:
        steps: of `batch_size` pictures each.
        lr: of SGD with momentum, after a warm-up, and a tenth of it in the last fifth of the steps.
    """
    device, classes = accelerator.device, len(train_set.classes)
    trunk.to(device).train()
    with torch.no_grad():
        size = trunk.stage4(
            torch.zeros(1, trunk.out_channels, trunk.roi_size, trunk.roi_size, device=device)
        ).numel()
    cls, reg = nn.Linear(size, classes + 1).to(device), nn.Linear(size, classes * 4).to(device)
    trained = [p for module in (trunk, cls, reg) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=1e-4)
    scheduler = Schedule(steps, lr, (steps * 4 // 5,), steps // 10).of(optimizer)
    feed = Feed(seed, 0, steps, device=device, workers=workers)
    loader = train_loader(train_set, pipeline, feed, trunk.normalisation, batch_size=batch_size)
    bar = tqdm(
        loader,
        "objects",
        steps,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    for step, batch in enumerate(bar):
        torch.manual_seed(launch.mix(Word.OBJECTS, seed, step))
        proposals = [
            near_and_far(boxes, *hw) for boxes, hw in zip(batch.boxes, batch.sizes, strict=True)
        ]
        rois = faster_rcnn.sample_rois(
            proposals, batch.boxes, batch.labels, classes=classes, number=ROIS, fraction=0.5
        )
        with accelerator.autocast():
            features = trunk(batch.images)
            aligned = faster_rcnn.roi_align(
                features, [r.boxes for r in rois], trunk.roi_size, trunk.stride
            )
            x = trunk.stage4(aligned).flatten(1)  # (RoIs of all pictures, size)
            losses = faster_rcnn.roi_losses(cls(x), reg(x).view(-1, classes, 4), rois)
        sum(losses.values()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(
            {name: f"{loss.item():.3g}" for name, loss in losses.items()}, refresh=False
        )
    trunk.cpu()


def near_and_far(boxes: Tensor, height: int, width: int) -> Tensor:
    """Proposals (n, 4) for a picture with objects in `boxes` (m, 4), xyxy: `NEAR` around each and
    `FAR` anywhere.

    The ends of the near ones are off by up to a third of the object's sides.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (m, 4)
    shift = (torch.rand(NEAR, *boxes.shape) * 2 - 1).to(boxes) / 3
    near = (boxes + shift * sides).flatten(0, 1)
    ends = torch.rand(FAR, 2, 2).sort(1).values.flatten(1).to(boxes)  # (FAR, 4)
    far = ends * boxes.new_tensor([width, height, width, height])
    proposals = ops.clip_boxes_to_image(torch.cat([near, far]), (height, width))
    return proposals[ops.remove_small_boxes(proposals, 1.0)]
