"""Staging, verifying and the card, without a Hub; and what of all this is committed."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import results as results_table
import safetensors.torch
import tags as tag_table
import timm
import torch
import yaml
import zoo
from authors_files import authors_state_dict
from card import hand_edited, render
from publish import check_stamp
from stage import stage
from staged import HERE, LICENCE, Staged, fill, parse_name, read_table
from training import DECOUPLED, METHODS
from verify import main as verify_main
from verify import verify

from ride_timm import InputError, load_legacy
from ride_timm.__main__ import main as evaluate_main
from ride_timm.checkpoint import RunFolder
from ride_timm.launch import exit_code
from ride_timm.losses import LOSSES
from ride_timm.methods import DECOUPLINGS
from ride_timm.recipe import Recipe

TAG = "test_ride_resnet.own_data"
SIZE = 32


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Makes a run folder of a tiny network: `make_run(seed=0, all=50.0, **model arguments)`."""

    def make(seed=0, accuracy=50.0, **kwargs):
        path = tmp_path_factory.mktemp("run")
        torch.manual_seed(seed)
        model = timm.create_model("test_ride_resnet", num_classes=4, **kwargs).eval()
        args = dict(model="test_ride_resnet", dataset="/home/somebody/beetles", imb_type="none", seed=seed, epochs=3)
        places = dict(data_dir="/home/somebody/data", annotations="/home/somebody/lists")
        recipe = Recipe(**args, **places, name="beetles", num_experts=model.num_experts)
        folder = RunFolder(path)
        folder.start(recipe)
        folder.export(model, dict(input_size=(3, SIZE, SIZE), crop_pct=1.0), ("ant", "bee", "cicada", "drone"))
        metrics = dict(all=accuracy, many=60.0, medium=50.0, few=None, top5=100.0, per_class=[70.0, 50.0, 60.0, 20.0])
        stages = dict(experts=metrics | dict(macs=1000, epochs=3))
        if model.router is not None:
            used = dict(experts_used=[0.5, 0.25, 0.25], threshold=0.5)
            stages["router"] = metrics | dict(macs=700, epochs=5, **used)
        facts = dict(num_processes=1, class_counts=[300, 150, 120, 30], seconds=125.0)
        folder.write_results(recipe, torch.device("cpu"), stages, **facts)
        return path

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(router=True, top_choices_num=3)


@pytest.fixture
def staged(run, tmp_path):
    return stage(run, TAG, tmp_path)


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def test_a_run_becomes_a_release(staged, run):
    assert {
        "model.safetensors",
        "config.json",
        "recipe.yaml",
        "results.json",
        "golden.safetensors",
        "classes.png",
    } <= set(staged.hashes())
    config = staged.json("config.json")
    assert config["sha256"] == staged.hashes()["model.safetensors"] and config["pretrained_cfg"]["tag"] == "own_data"
    found = verify(staged)
    assert found["golden"] < 1e-4 and found["files"] == staged.hashes() and found["measured"] is None
    model = timm.create_model(f"local-dir:{staged.path}", pretrained=True).eval()
    golden = safetensors.torch.load_file(staged.path / "golden.safetensors")
    torch.testing.assert_close(model(golden["input"]), golden["output"])
    for path in staged.path.iterdir():  # no places on this machine
        assert b"somebody" not in path.read_bytes() and str(run).encode() not in path.read_bytes()


def test_the_card_says_what_the_data_say(staged):
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    front = front_matter(text)
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"
    assert front["license"] == "mit" and front["metrics"] == ["accuracy"]
    metrics = {m["name"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["accuracy, all, ensemble"] == 50.0 and metrics["accuracy, many, routed"] == 60.0
    assert not [name for name in metrics if "few" in name]  # there are no few-shot classes: nothing is made up
    assert "| ensemble | 50.0 | 60.0 | 50.0 | – | 100.0 |" in text and "| 50.0 / 25.0 / 25.0 % |" in text
    assert "20 % (drone, 30 training images)" in text and "One run of one seed" in text and "2 minutes" in text
    assert (
        "forward_routed" in text
        and "| 600, 300 to 30 a class (classes: 3 many-shot, 1 medium-shot, 0 few-shot) |" in text
        and "{{" not in text
        and "None," not in text
    )
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        compile(block, "card", "exec")
    assert len(blocks) == 2


def render_with(staged, **changes):
    recipe = dataclasses.replace(staged.recipe(), **changes)
    (staged.path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return render(staged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(loss="ride"), ["by RIDE ([arXiv:2010.01809]", "drives them apart", "please cite their paper:"]),
        (dict(loss="ride"), ["| loss | ride, diversity factor -0.45, re-weighted after epoch 160 |"]),
        (dict(additional_diversity_factor=0.0, reweight=False), ["loss knows how rare", "diversity factor 0 |"]),
        (dict(loss="ldam"), ["by LDAM (", "| ldam, re-weighted after epoch 160 |", "The loss pushes towards rare"]),
        (dict(loss="balpoe"), ["by BalPoE ([arXiv:2206.05260]", "the papers of BalPoE (", "balpoe, taus 0, 1, 2 |"]),
        (dict(loss="sade", inverse_tau=1.5), ["by SADE (", "| loss | sade, inverse tau 1.5 |", "towards rare classes"]),
        (dict(loss="mdcs", auto_augment="original"), ["by MDCS (", "taus -0.5, 1, 2.5, consistency 0.6 |"]),
        (dict(loss="logit_adjustment", tau=1.5), ["| logit_adjustment, tau 1.5 |"]),
        (dict(loss="focal"), ["by the focal loss (", "| focal, gamma 1 |", "does not know how rare a class is."]),
        (dict(loss="ce"), ["by cross entropy: 3 experts share", "please cite their paper:", "answered less often"]),
        (dict(loss="ce", distillation=True), ["is: only its teacher may", "--teacher path/to", "with a teacher |"]),
        (dict(router_balanced=False), ["| 5 epochs of batches of 512, as images come, learning rate 0.01"]),
        (dict(router_optimizer="adamw"), ["| 5 epochs of class-balanced batches of 512, adamw, learning rate 0.01"]),
        (
            dict(loss="ce", decouple="crt", decouple_epochs=7),
            ["re-balanced afterwards by cRT ([arXiv:1910.09217]", "| heads, re-balanced | crt, 7 epochs of class-bal",
             "The re-balancing pushes", "the heads of trained experts for", "--from path/to/the/trained/run",
             "https://arxiv.org/abs/1910.09217)), which re-balanced it; and that of RIDE"],
        ),
        (dict(decouple="tau_norm", decouple_tau=1.5), ["by tau-normalization (", "| tau_norm, tau 1.5 |"]),
        (dict(decouple="logit_adjustment"), ["afterwards by logit adjustment (", "| logit_adjustment, tau 1 |"]),
    ],
)  # fmt: skip
def test_the_card_names_the_method(staged, changes, said):
    text = render_with(staged, **changes)
    assert [words for words in said if words not in text] == []
    assert ("re-balanced" in text) == ("decouple" in changes)


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        (dict(router=None), {}, ["recipe.yaml --stage experts\n", "the experts for 3 epochs. The"]),
        (dict(experts=None), {}, ["a router for trained experts for 5 epochs. The", "--stage router --from path"]),
        (dict(experts=0), dict(decouple="tau_norm"), ["trained experts, re-balanced in closed form, then the"]),
    ],
)  # fmt: skip
def test_the_card_tells_the_stages_that_were_trained(staged, stages, changes, said):
    results = staged.json("results.json")
    for name, epochs in stages.items():
        if epochs is None:
            del results["stages"][name]
        else:
            results["stages"][name]["epochs"] = epochs
    set_json(staged.path / "results.json", stages=results["stages"])
    text = render_with(staged, **changes)
    assert [words for words in said if words not in text] == []
    assert ("| router |" in text) == ("router" in results["stages"])


def test_the_card_says_where_experts_were_moved(make_run, tmp_path):
    kwargs = dict(router=True, top_choices_num=3)
    plain, aligned = make_run(**kwargs), make_run(**kwargs, class_affine=True)
    for run, loss, moved in ((plain, "balpoe", False), (aligned, "balpoe", True), (aligned, "ride", False)):
        text = render_with(stage(run, TAG, tmp_path), loss=loss)
        assert ("the experts moved to the class prior of their mean" in text) == moved


def test_every_method_has_its_line():
    assert set(METHODS) == set(LOSSES) and set(DECOUPLED) | {"none"} == set(DECOUPLINGS)


def test_seeds_give_a_spread(make_run, run, tmp_path):
    other = make_run(seed=1, accuracy=52.0, router=True, top_choices_num=3)
    text = (stage(run, TAG, tmp_path, seeds=(other,)).path / "README.md").read_text(encoding="utf-8")
    assert "| ensemble | 51.0 ± 1.4 | 60.0 ± 0.0 |" in text and "Over 2 runs" in text
    with pytest.raises(InputError, match="every seed once"):
        stage(run, TAG, tmp_path, seeds=(run,))
    with pytest.raises(InputError, match=r"another recipe \(num_experts\)"):
        stage(run, TAG, tmp_path, seeds=(make_run(seed=2, num_experts=2),))


def test_what_is_written_by_hand_is_kept(staged, run):
    card = staged.path / "README.md"
    text = card.read_text(encoding="utf-8")
    assert hand_edited(text) == "None."
    card.write_text(text.replace("None.", "Seen in the wild.\n\n| a | b |"), encoding="utf-8")
    verify(staged)
    again = stage(run, TAG, staged.path.parent)
    assert hand_edited((again.path / "README.md").read_text(encoding="utf-8")) == "Seen in the wild.\n\n| a | b |"
    assert render(again, "x") == render(again, "x")


def test_plain_networks_without_a_router(make_run, tmp_path):
    staged = stage(make_run(num_experts=1), TAG, tmp_path)
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert "with one expert" in text and "forward_routed" not in text and "router" not in text
    assert "1 experts" not in text and "one expert's" in text and "`test_ride_resnet`, one expert |" in text
    assert verify(staged)["golden"] < 1e-4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18.a1", "the NAME one of"),
        ("ride_resnet32", "the TAG of small letters"),
        ("ride_resnet32.../../etc", "the TAG of small letters"),
        ("test_ride_resnet.Own", "the TAG of small letters"),
    ],
)
def test_names(name, message):
    with pytest.raises(InputError, match=message):
        parse_name(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "results.json").unlink(), r"holds no results\.json: not a run folder"),
        (lambda path: set_json(path / "config.json", architecture="ride_resnet50"), "holds a ride_resnet50, not a"),
    ],
)  # fmt: skip
def test_sources_that_are_none(run, tmp_path, damage, message):
    source = Path(shutil.copytree(run, tmp_path / "run"))
    damage(source)
    with pytest.raises(InputError, match=message):
        stage(source, TAG, tmp_path / "hub")
    assert not list((tmp_path / "hub").iterdir())  # nothing half-written


def test_a_registered_tag_has_its_own_classes(run, tmp_path):
    with pytest.raises(InputError, match=r"has 4 classes, the tag test_ride_resnet\.untrained 1000"):
        stage(run, "test_ride_resnet.untrained", tmp_path)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def set_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip_a_bit(path / "model.safetensors"), r"is not the file whose sha256 config\.json states"),
        (lambda path: flip_a_bit(path / "golden.safetensors"), r"golden|experts used"),
        (lambda path: (path / "golden.safetensors").write_bytes(b"x"), "is no golden pair"),
        (lambda path: set_json(path / "results.json", seconds=1), "says something else than its data"),
        (lambda path: (path / "model.pth").write_bytes(b"x"), r"model\.pth does not belong to a release"),
        (lambda path: (path / "curves.png").symlink_to("/etc/passwd"), r"curves\.png does not belong"),
        (lambda path: (path / "more").mkdir(), "more does not belong"),
        (lambda path: (path / "README.md").unlink(), r"holds no README\.md"),
        (lambda path: (path / "recipe.yaml").write_text("module: os\n"), "unknown key module"),
        (lambda path: (path / "recipe.yaml").write_text("dataset: /etc\n"), "names data on a disk"),
        (lambda path: (path / "recipe.yaml").write_text("data_dir: ../..\n"), "names data on a disk"),
        (lambda path: (path / "recipe.yaml").write_text("annotations: /etc\n"), r"names data on a disk \(annotations"),
    ],
)
def test_verify_notices(staged, damage, message, capsys):
    verify(staged)
    damage(staged.path)
    assert exit_code(verify_main, [TAG, "--root", str(staged.path.parent)]) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(InputError):  # nor can it be published
        check_stamp(staged)


def test_a_recipe_is_data(staged):
    """YAML that would build objects is refused, and so is every key that is none of a recipe."""
    from ride_timm.recipe import load_recipe

    for text in ("name: !!python/object/apply:os.system ['true']\n", "model: !!python/name:os.system\n"):
        (staged.path / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match="not YAML"):
            load_recipe(staged.path / "recipe.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "data_dir: /home/somebody\n",
        "dataset: /etc\n",
        "dataset: ../secret\n",
        "dataset: a/../../b\n",
        "annotations: lists\n",
    ],
)
def test_a_downloaded_recipe_names_no_place_on_this_disk(staged, text):
    (staged.path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match="is of a release and names data on a disk"):
        evaluate_main(["evaluate", "--model", str(staged.path)])


# the authors' model zoo


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def authors_checkpoint(path, network, marker=None, **kwargs):
    """A file as the authors' code writes it, of random weights, with a hostile configuration."""
    model = timm.create_model(network, **kwargs)
    theirs = {f"module.{key}": value for key, value in authors_state_dict(model).items()}
    torch.save(dict(arch="DataParallel", epoch=200, state_dict=theirs, config=Evil(marker or path)), path)
    return path


def test_every_checkpoint_of_the_zoo_has_its_tag():
    checkpoints = zoo.read_zoo()["checkpoints"]
    assert len(checkpoints) == 10 and len({row["file"] for row in checkpoints.values()}) == 10
    for tag, row in checkpoints.items():
        assert timm.get_pretrained_cfg(tag).num_classes in (100, 1000, 8142)
        args = read_table()[tag]["model_args"]
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
    assert "Claimed by the authors of the paper for this checkpoint, not measured here" in text
    assert "| RIDE + distillation | 49.4 | 67.7 | 51.3 | 25.7 |" in text and "with a router" in text
    metrics = front_matter(text)["model-index"][0]["results"][0]["metrics"]
    assert all("claimed by the authors, not measured here" in metric["name"] for metric in metrics)
    assert "Victor Huang" in (staged.path / LICENCE).read_text() and "[LICENSE](LICENSE)" in text
    assert staged.json("results.json")["stages"] == {}
    verify(staged)


def test_which_checkpoint_is_which(tmp_path):
    path = authors_checkpoint(tmp_path / "x.pth", "ride_resnet32", router=True, top_choices_num=30)
    with pytest.raises(InputError, match=r"may be ride_resnet32\.cifar100_lt100_zoo or .*_distill: say which by --tag"):
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
    assert "measured with a router, which this checkpoint does not have" in text


# what is committed


def test_the_table_of_tags_is_as_rendered():
    page = tag_table.PAGE.read_text(encoding="utf-8")
    assert fill(page, tag_table.BEGIN, tag_table.END, tag_table.render_table()) == page, "python hub/tags.py"
    assert {row["state"] for row in tag_table.rows()} <= {"published", "staged", "convertible", "trainable"}
    assert {row["tag"] for row in tag_table.rows()} >= set(read_table())


def test_the_results_in_the_readme_are_those_of_the_releases():
    page = results_table.PAGE.read_text(encoding="utf-8")
    assert fill(page, results_table.BEGIN, results_table.END, results_table.render_table()) == page, (
        "python hub/results.py"
    )
    for folder in HERE.glob("*/config.json"):
        stages = json.loads(folder.with_name("results.json").read_text())["stages"]
        accuracies = [f"{metrics['all']:.1f}" for metrics in stages.values()]
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| [`{folder.parent.name}`]")]
        assert [row[2] for row in rows][: len(accuracies)] == accuracies


def test_results_of_seeds_checkpoints_and_unmeasured_releases(make_run, run, tmp_path):
    seeds = (make_run(seed=1, accuracy=56.0),)
    stage(run, TAG, tmp_path, seeds=seeds, measured=False)
    plain = authors_checkpoint(tmp_path / "plain.pth", "ride_resnet32")
    theirs = zoo.convert(plain, "ride_resnet32.cifar100_lt100_zoo", tmp_path)
    assert len(results_table.measured(tmp_path)) == 1 and "zoo" not in results_table.render_table(tmp_path)
    shutil.copytree(theirs.path, tmp_path / ".left.over")
    results = theirs.json("results.json")
    results["stages"] = dict(experts=dict(all=48.0, many=60.0, medium=50.0, few=20.0, macs=102_000_000))
    results |= dict(device="cpu", commit=None)
    (theirs.path / "results.json").write_text(json.dumps(results))
    text = results_table.render_table(tmp_path)
    assert text.count("ride_resnet32.cifar100_lt100_zoo`](") == 1 and ".left" not in text
    assert "CIFAR100-LT (imbalance factor 100), the authors' checkpoint, measured, fp32, cpu." in text
    assert "| ensemble, mean ± deviation of seeds 0, 1 | 53.0 ± 4.2 |" in text
    assert "seed 0, fp32" in text and "those of the last epoch" in text


def test_a_page_without_the_lines_to_fill():
    with pytest.raises(InputError, match="has no lines <!-- a --> and <!-- b -->"):
        fill("a page\n<!-- b -->\n", "<!-- a -->", "<!-- b -->", "text")
    assert fill("x\n<a>\nold\n<b>\ny", "<a>", "<b>", r"\1 new") == "x\n<a>\n\\1 new\n<b>\ny"


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in HERE.glob("*/config.json")))
def test_what_is_staged_here_is_verified_and_stands_in_the_table(folder):
    staged = Staged.find(folder, HERE)
    seen = staged.json("verified.json")["files"]
    assert seen == staged.hashes()
    assert read_table()[folder]["sha256"] == seen["model.safetensors"] == staged.json("config.json")["sha256"]
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert text == render(staged, hand_edited(text)), f"python hub/card.py {folder}, and verify it again"
