"""Progressive resizing: what a batch is shrunk to, when, and what is refused."""

import pytest
import timm
import torch
from journeys import flags_of, rows_of, stop_after_epoch

from ride_timm import InputError
from ride_timm.checkpoint import RunFolder
from ride_timm.progressive import check_sizes, shrink
from ride_timm.recipe import Recipe, load_recipe


@pytest.mark.parametrize("size", [8, 12, 24])
def test_shrunk_images_keep_what_each_pixel_covers(size):
    """Against Pillow's bilinear filter, which weighs the whole area as well."""
    import numpy as np
    from PIL import Image

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    found = shrink(images, size)
    assert found.shape == (2, 3, size, size) and found.is_contiguous(memory_format=torch.channels_last)
    for image, small in zip(images.flatten(0, 1), found.flatten(0, 1), strict=True):
        expected = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(small.numpy(), np.asarray(expected), atol=1e-5)


def test_sides_by_epoch():
    stage = Recipe(epochs=10, progressive_sizes=[16, 24], progressive_epochs=[3, 7]).stage("experts")
    assert [stage.size_at(epoch) for epoch in range(10)] == [16] * 3 + [24] * 4 + [None] * 3


@pytest.mark.parametrize("other", [dict(decouple="crt"), dict()])
def test_only_the_experts_own_training_resizes(other):
    recipe = Recipe(epochs=10, progressive_sizes=[16], progressive_epochs=[3], **other)
    assert recipe.stage("router").size_at(0) is None
    assert recipe.stage("experts").size_at(0) == (None if other else 16)


@pytest.mark.parametrize(
    ("values", "sizes", "ends"),
    [
        (dict(epochs=100), (16, 24), (30, 70)),
        (dict(epochs=3), (16, 24), (1, 2)),
        (dict(epochs=2), (16,), (1,)),  # no epoch is left for the second side
        (dict(epochs=1), (), ()),
        (dict(epochs=100, progressive_epochs=[10, 20]), (16, 24), (10, 20)),
        (dict(epochs=100, progressive_sizes=[12, 20]), (12, 20), (30, 70)),
        (dict(progressive_sizes=[]), (), ()),
        (dict(epochs=100, progressive_sizes=[]), (), ()),
    ],
)
def test_epochs_scale_with_the_run(values, sizes, ends):
    recipe = load_recipe("cifar100_lt_progressive").override(values)
    assert (recipe.progressive_sizes, recipe.progressive_epochs) == (sizes, ends)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(progressive_sizes=[16]), r"=\[16\] and progressive_epochs=\[\]: give each side"),
        (dict(progressive_epochs=[5]), r"=\[\] and progressive_epochs=\[5\]: give each side"),
        (dict(progressive_sizes=[16, 24], progressive_epochs=[5, 5]), r"\[5, 5\]: expected ascending epochs below"),
        (dict(progressive_sizes=[16, 24], progressive_epochs=[6, 5]), "ascending epochs"),
        (dict(progressive_sizes=[16], progressive_epochs=[10]), r"\[10\].* below epochs=10, so that the run ends at"),
        (dict(progressive_sizes=[4], progressive_epochs=[5]), "8 or more"),
        (
            dict(progressive_sizes=[16], progressive_epochs=[5], distillation=True),
            "the teacher learned from whole images",
        ),
        (dict(progressive_sizes=[16], progressive_epochs=[5], patience=2, holdout=0.1), "patience=2 and progressive"),
    ],
)
def test_a_schedule_that_is_none_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Recipe(**dict(dict(epochs=10), **values))


def test_sides_that_the_input_or_the_network_forbids():
    model = timm.create_model("ride_resnet32", num_experts=2, num_classes=3)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    check_sizes(model, [8, 16], 32)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for size in (32, 40):
        with pytest.raises(InputError, match=rf"\[8, {size}\]: expected sides below the input's 32"):
            check_sizes(model, [8, size], 32)
    fixed = timm.create_model("ride", backbone="test_vit", dynamic_img_size=False, num_classes=3)
    with pytest.raises(InputError, match=r"does not take images of 48 pixels .*takes images of any size"):
        check_sizes(fixed, [48], 160)


def test_a_run_resizes_and_resumes_alike(train, script, colours, tmp_path, monkeypatch):
    """The sides that the network meets, epoch by epoch; stopped and resumed, it ends with the same weights."""
    sides = []  # at no side does a strided convolution meet one pixel: in bf16 on AMX torch gets its gradient wrong

    def seen(images, size):
        sides.append(size)
        return shrink(images, size)

    monkeypatch.setattr(script, "shrink", seen)
    early = ["--stage", "experts", "--progressive-sizes", "20", "24", "--progressive-epochs", "1", "2", "--epochs", "3"]
    early += ["--eval-every", "1"]
    whole = tmp_path / "whole"
    assert train(flags_of(colours, whole, *early)) == 0
    steps = len(sides) // 2
    assert steps > 0 and sides == [20] * steps + [24] * steps
    assert len(rows_of(whole)) == 3 and RunFolder(whole).recipe().progressive_sizes == (20, 24)
    torn = tmp_path / "torn"
    with monkeypatch.context() as patched:
        stop_after_epoch(patched, script)
        assert train(flags_of(colours, torn, *early)) == 143
    assert train(["--output", torn, "--resume", "--stage", "experts", "--threads", "1"]) == 0
    assert sides == ([20] * steps + [24] * steps) * 2
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_refused_before_the_run_begins(train, colours, tmp_path, capsys):
    flags = ["--progressive-sizes", "32", "--progressive-epochs", "1"]
    assert train(flags_of(colours, tmp_path / "no", *flags)) == 2
    assert "expected sides below the input's" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
