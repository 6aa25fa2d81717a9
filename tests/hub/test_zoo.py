"""The authors' checkpoints as releases."""

import shutil

import pytest
import timm
import torch
import zoo
from authors_files import authors_checkpoint
from folder import LICENCE, read_releases
from release_files import front_matter
from verify import verify

from ride_timm import InputError, load_legacy


def test_every_checkpoint_of_the_zoo_has_its_tag():
    checkpoints = zoo.read_zoo()["checkpoints"]
    assert len(checkpoints) == 10 and len({row["file"] for row in checkpoints.values()}) == 10
    for tag, row in checkpoints.items():
        assert timm.get_pretrained_cfg(tag).num_classes in (100, 1000, 8142)
        args = read_releases()[tag]["model_args"]
        assert args.get("num_experts", 3) == zoo.experts_of(tag) and bool(args.get("router")) == row["routed"]
        assert 0 < row["few"] < row["all"] + 2 < 80


def test_a_checkpoint_of_the_zoo_becomes_a_release(tmp_path):
    marker = tmp_path / "executed"
    kwargs = dict(num_experts=4, router=True, top_choices_num=30)
    path = authors_checkpoint(tmp_path / "any.pth", "ride_resnet32", marker, **kwargs)
    marker.unlink(missing_ok=True)  # pickling opens nothing, but be sure
    staged = zoo.convert(path, root=tmp_path / "hub")
    assert staged.name == "ride_resnet32.cifar100_lt100_distill_4experts" and not marker.exists()
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f"local-dir:{staged.path}", pretrained=True).eval()
    assert torch.equal(model(images), load_legacy(path)(images))
    assert model.router is not None and model.pretrained_cfg["mean"] == [0.4914, 0.4822, 0.4465]
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert "Claimed by the authors for this checkpoint, not measured here" in text
    assert "| RIDE + distillation | 49.4 | 67.7 | 51.3 | 25.7 |" in text and "with a router" in text
    metrics = front_matter(text)["model-index"][0]["results"][0]["metrics"]
    assert all("claimed by the authors, not measured here" in metric["name"] for metric in metrics)
    assert "Victor Huang" in (staged.path / LICENCE).read_text() and "[LICENSE](LICENSE)" in text
    assert staged.json("results.json")["stages"] == {}
    verify(staged)


def test_which_checkpoint_is_which(tmp_path):
    path = authors_checkpoint(tmp_path / "x.pth", "ride_resnet32", router=True, top_choices_num=30)
    with pytest.raises(InputError, match=r"may be ride_resnet32\.cifar100_lt100_zoo or .*: choose one by --tag"):
        zoo.recognise(path)
    named = tmp_path / "cifar_standard_distill_003240.pth"
    shutil.copyfile(path, named)
    assert zoo.recognise(named) == "ride_resnet32.cifar100_lt100_distill"
    with pytest.raises(
        InputError, match=r"holds a ride_resnet32 of 3 experts, not ride_resnet32\.cifar100_lt100_6experts"
    ):
        zoo.convert(path, "ride_resnet32.cifar100_lt100_6experts", tmp_path / "hub")
    two = authors_checkpoint(tmp_path / "two.pth", "ride_resnet32", num_experts=2)
    with pytest.raises(InputError, match=r"2 experts and 100 classes, none of the zoo's"):
        zoo.recognise(two)
    plain = authors_checkpoint(tmp_path / "plain.pth", "ride_resnet32")  # three experts, no router
    staged = zoo.convert(plain, "ride_resnet32.cifar100_lt100_zoo", tmp_path / "hub")
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert "measured with a router, which this checkpoint lacks" in text
