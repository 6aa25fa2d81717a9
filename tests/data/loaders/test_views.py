"""Two views of a batch."""

import torch

from ride_timm.data.augment.transforms import get_policy
from ride_timm.data.load import load_longtail
from ride_timm.data.loaders.loader import make_loader
from ride_timm.data.loaders.views import TwoViews


def test_both_views_show_the_same_images_in_the_same_order(colours):
    images = load_longtail(str(colours), imb_type="none").train
    plain = get_policy("cifar")

    def loader(policy):
        return make_loader(images, policy, train=True, batch_size=16, seed=0)

    views = TwoViews(loader(plain), loader(plain.with_auto_augment("rand-m5-mstd0.5")))
    assert len(views) == len(views.loaders[0]) == len(views.loaders[1]) == 4
    seen = []
    for epoch in (0, 1):
        views.set_epoch(epoch)
        alone = loader(plain)
        alone.set_epoch(epoch)
        for (both, labels), (weak, expected) in zip(views, alone, strict=True):
            assert len(both) == 2 * len(labels) and torch.equal(labels, expected)
            assert torch.equal(both[: len(labels)], weak) and not torch.equal(both[len(labels) :], weak)
            assert all(not torch.equal(a, b) for a, b in zip(both[len(labels) :], weak, strict=True))
            strong_brightest = both[len(labels) :].mean((2, 3)).argmax(1)  # the colour of a class survives most changes
            seen.append((strong_brightest == labels).float().mean())
    assert torch.stack(seen).mean() > 0.6
