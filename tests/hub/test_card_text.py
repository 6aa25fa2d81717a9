"""Method, command, settings and papers on a card, for every way of training."""

import dataclasses
import json
import shutil

import pytest
import timm
from card import render
from card_text import DECOUPLED, Base, compute, widget
from folder import HERE
from release_files import TAG, front_matter, set_json
from stage import stage
from tables import render_results
from verify import verify

from ride_timm import InputError
from ride_timm.training.recipe import load_recipe
from ride_timm.training.recipe_keys import DECOUPLINGS


def render_with(staged, **changes):
    recipe = dataclasses.replace(staged.recipe(), **changes)
    (staged.path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    results = staged.json("results.json")
    data, stages = results["data"], results["stages"]
    if "decouple" in changes and "heads" not in stages:
        stages = {name.replace("experts", "heads"): metrics for name, metrics in stages.items()}
    data |= {key: changes[key] for key in data.keys() & changes}
    set_json(staged.path / "results.json", data=data, stages=stages)
    return render(staged)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(loss="ride"), ["with RIDE ([arXiv:2010.01809]", "loss drives the experts apart", "Please cite RIDE:"]),
        (dict(loss="ride"), ["| loss | ride, ", ", additional_diversity_factor -0.45", ", reweight_epoch 160, "]),
        (dict(loss="ride", reweight=False), [", reweight no, "]),
        (dict(loss="balpoe"), ["with BalPoE ([arXiv:2206.05260]", "RIDE, BalPoE ([arXiv", ", taus (0, 1, 2) |"]),
        (dict(loss="balpoe"), ["| loss | balpoe, label_smoothing 0, taus "]),
        (dict(loss="balpoe", tau_reach=0.5), [", tau_reach 0.5, taus (0.5, 1, 1.5) |"]),
        (dict(loss="sade", inverse_tau=1.5), ["with SADE (", "inverse_tau 1.5 |", "Training favours rare classes."]),
        (dict(loss="mdcs", auto_augment="original"), ["with MDCS (", "taus (-0.5, 1, 2.5)", "consistency 0.6"]),
        (dict(loss="focal"), ["with the focal loss (", "| loss | focal, gamma 1 |", "knows nothing of class freq"]),
        (dict(loss="ce"), ["with cross entropy: 3 experts share", "Please cite RIDE:", "knows nothing of class freq"]),
        (dict(loss="ce", distillation=True), ["recipe.yaml --teacher path/to/the/teacher\n"]),
        (dict(sampler="square_root"), ["| epochs, batch size | ", ", sampler square_root |"]),
        (dict(loss="ce", class_weights="auto"), ["| class weights | inverse square root of the training images |"]),
        (dict(loss="ce", class_weights="w.csv"), ["| class weights | see results.json |"]),
        (dict(router_balanced=False), ["| 5 epochs of batches of 512, sgd, learning rate 0.01, pos_weight 100 |"]),
        (dict(router_optimizer="adamw"), ["| 5 epochs of class-balanced batches of 512, adamw, learning rate 0.01,"]),
        (
            dict(loss="ce", decouple="crt", decouple_epochs=7),
            ["re-balanced afterwards with cRT ([arXiv:1910.09217]", "| crt, 7 epochs of class-balanced batches of 128,",
             "Training favours rare classes.", "the classifiers of trained experts for 3 epochs, then the router for 5",
             "recipe.yaml --from path/to/the/trained/run\n", "Please cite RIDE, cRT ([arXiv:1910.09217]"],
        ),
        (dict(decouple="tau_norm", decouple_tau=1.5), ["with tau-normalization (", "| tau_norm, tau 1.5 |"]),
        (dict(decouple="logit_adjustment"), ["afterwards with logit adjustment (", "| logit_adjustment, tau 1 |"]),
        (dict(decay_epochs=()), ["| 0.1, 5 warm-up epochs, constant |"]),
        (dict(decay_epochs=(7, 9)), ["| 0.1, 5 warm-up epochs, x 0.01 after epochs 7, 9 |"]),
        (dict(mixup_alpha=0.4, random_erasing=0.5), ["| cifar, random_erasing 0.5, mixup_alpha 0.4 |"]),
        (dict(auto_augment="cifar10", cutout=16), ["| cifar, auto_augment cifar10, cutout 16 |"]),
        (dict(select="best", holdout=0.1), ["The epoch was selected on held-out training images, not on the test"]),
        (dict(select="best", use_val=True), ["The epoch was selected on validation images, not"]),
        (dict(ema_decay=0.999), ["| EMA of the weights | decay 0.999 |"]),
        (dict(dataset="cifar10", imb_type="none"), ["recipe.yaml --data-dir path/to", "copy of cifar10; `--imb-type"]),
    ],
)  # fmt: skip
def test_the_card_names_the_method(staged, changes, expected):
    text = render_with(staged, **changes)
    assert [words for words in expected if words not in text] == []
    assert ("re-balanced" in text) == ("decouple" in changes)


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        (dict(router=None), {}, ["recipe.yaml --stage experts\n", "the experts for 3 epochs. The", "| loss |"]),
        (dict(experts=None), {}, ["`ride_timm`: the router for 5 epochs. The", "--stage router --from path"]),
        (dict(experts=None, heads=1, router=None), dict(decouple="crt"),
         ["the classifiers of trained experts for one epoch. The", "| crt, 10 epochs of class-balanced batches of"]),
        (dict(experts=None, heads=0, router=5), dict(decouple="tau_norm"),
         ["in closed form, then the router for 5 epochs. The metrics are"]),
        (dict(experts=None, heads=0, router=None), dict(decouple="tau_norm"),
         ["in closed form. The metrics are of the test set"]),
        (dict(heads=20, router=5), dict(decouple="balanced_softmax"),
         ["the experts for 3 epochs, then their classifiers for 20 epochs, then the router for 5 epochs. The",
          "| balanced_softmax, 10 epochs of batches of 128,", "train_accelerate.py --recipe recipe.yaml\n"]),
    ],
)  # fmt: skip
def test_the_card_names_the_stages_that_were_trained(staged, stages, changes, expected):
    results = staged.json("results.json")
    given = results["stages"]
    results["stages"] = {
        name: given.get(name, given["experts"]) | dict(epochs=epochs)
        for name in ("experts", "heads", "router")
        if (epochs := stages.get(name, given[name]["epochs"] if name in given else None)) is not None
    }
    set_json(staged.path / "results.json", stages=results["stages"])
    text = render_with(staged, **changes)
    assert [words for words in expected if words not in text] == []
    assert ("| router |" in text) == ("router" in results["stages"])
    assert ("| loss |" in text) == ("experts" in results["stages"])


def test_the_card_names_prior_aligned_experts(make_run, tmp_path):
    kwargs = dict(router=True, top_choices_num=3)
    plain, aligned = make_run(**kwargs), make_run(**kwargs, class_affine=True)
    for run, loss, expected in ((plain, "balpoe", False), (aligned, "balpoe", True), (aligned, "ride", False)):
        text = render_with(stage(run, TAG, tmp_path), loss=loss)
        assert ("experts prior-aligned afterwards" in text) == expected


def test_the_card_of_one_expert(make_run, tmp_path):
    text = render_with(stage(make_run(num_experts=1), TAG, tmp_path), loss="cb_ce", decouple="lws")
    assert "class-balanced cross entropy (" in text and "with one expert. The classifiers were re-balanced" in text
    assert "--stage" not in text


def test_every_decoupling_is_cited():
    assert set(DECOUPLED) | {"none"} == set(DECOUPLINGS)


@pytest.mark.parametrize("spec", ["/home/somebody/runs/teacher", "ride_resnet32.cifar100_lt100_6experts"])
def test_the_card_names_the_teacher(run, tmp_path, spec):
    taught = shutil.copytree(run, tmp_path / "taught")
    recipe = dataclasses.replace(load_recipe(taught / "recipe.yaml"), distillation=True)
    (taught / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    set_json(taught / "results.json", teacher=dict(spec=spec, sha256="0" * 64))
    staged = stage(taught, TAG, tmp_path / "hub")
    verify(staged)
    card, private = (staged.path / "README.md").read_text(encoding="utf-8"), spec.startswith("/")
    assert staged.json("results.json")["teacher"] == dict(spec=None if private else spec, sha256="0" * 64)
    assert f"| teacher | {'an earlier run' if private else f'`{spec}`'}, sha256 of its weights 000000000000 |" in card
    assert f"--teacher {'path/to/the/teacher' if private else spec}\n" in card and "somebody" not in card
    set_json(staged.path / "results.json", teacher=dict(spec="/home/somebody", sha256="0" * 64))
    with pytest.raises(InputError, match="teacher='/home/somebody': expected a release"):
        verify(staged)


def test_the_usage_of_adapters_installs_peft(staged):
    assert "\npip install .  # in a clone" in render(staged)
    config = staged.json("config.json")
    set_json(staged.path / "config.json", model_args=config["model_args"] | dict(adapter="lora"))
    text = render(staged)
    assert '\npip install ".[adapters]"  # in a clone' in text and 'install ".[transformers,adapters]"' in text


@pytest.mark.parametrize("stages", [("experts", "router"), ("experts",), ("router",)])
@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("ride_resnet32.cifar100_lt100_zoo", "ride_resnet32.cifar100_lt100_zoo"),
        ("ride_resnet32", "ride_resnet32.cifar100_lt100"),  # its default tag
        ("hf-hub:somebody/beetles", "hf-hub:somebody/beetles"),
        (HERE / "ride_resnet32.fashion_lt", "ride_resnet32.fashion_lt"),  # the very weights of the release
        ("runs/ride_resnet32.fashion_lt", None),
        ("/home/somebody/runs/beetles", None),
    ],
)
def test_a_release_names_public_weights_that_it_started_from(run, tmp_path, source, public, stages):
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    kept = {name: json.loads((run / "results.json").read_text())["stages"][name] for name in stages}
    set_json(begun / "results.json", source=str(source), stages=kept)
    staged = stage(begun, TAG, tmp_path / "hub")
    assert staged.json("results.json")["source"] == public
    card = (staged.path / "README.md").read_text(encoding="utf-8")
    start = f"`{public}`" if public else "an earlier run"
    assert card.count(f" (starting from {start})") == 1
    assert f" --from {public or 'path/to/the/trained/run'}\n" in card
    assert ("--stage router --from" in card) == (stages == ("router",))
    assert f"epochs, starting from {start}, seed 0" in render_results(tmp_path / "hub")


MIT = dict(license="mit")


@pytest.mark.parametrize(
    ("changes", "source", "base", "relation", "licence"),
    [
        ({}, None, None, None, MIT),  # from scratch
        (dict(model="ride", backbone="convnext_tiny"), None, None, None, MIT),
        (dict(model="ride", backbone="convnext_tiny.fb_in1k", backbone_pretrained=True), None,
         "timm/convnext_tiny.fb_in1k", "finetune", dict(license="apache-2.0")),
        (dict(model="ride", backbone="convnextv2_tiny", backbone_pretrained=True, adapter="lora"), None,
         "timm/convnextv2_tiny.fcmae_ft_in22k_in1k", "adapter", dict(license="cc-by-nc-4.0")),
        (dict(model="ride", backbone="convnext_tiny.fb_in1k", backbone_pretrained=True, adapter="lora"), None,
         "timm/convnext_tiny.fb_in1k", "finetune", dict(license="apache-2.0")),  # merged
        (dict(model="ride_swin_tiny", backbone_pretrained=True), None,
         "timm/swin_tiny_patch4_window7_224.ms_in1k", "finetune", dict(license="mit")),
        (dict(model="ride", backbone="vit_small_patch16_dinov3", backbone_pretrained=True), None,
         "timm/vit_small_patch16_dinov3.lvd1689m", "finetune",
         dict(license="other", license_name="dinov3-license",
              license_link="https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m")),
        ({}, "ride_resnet32.cifar100_lt100", "ride-timm/ride_resnet32.cifar100_lt100", "finetune", MIT),
        (dict(model="ride", backbone="convnextv2_tiny", backbone_pretrained=True), "hf-hub:alice/beetles@v1",
         "alice/beetles", "finetune", dict(license="cc-by-nc-4.0")),
        ({}, "hf-hub:alice/beetles", "alice/beetles", "finetune",
         dict(license="other", license_name="unknown", license_link="https://huggingface.co/alice/beetles")),
        ({}, "hf-hub:ride-timm/ride_resnet32.mine", "ride-timm/ride_resnet32.mine", "finetune", MIT),
    ],
)  # fmt: skip
def test_the_base_model_and_its_licence_are_carried_on(staged, changes, source, base, relation, licence):
    set_json(staged.path / "results.json", source=source)
    if relation == "adapter":
        set_json(
            staged.path / "config.json", model_args=staged.json("config.json")["model_args"] | dict(adapter="lora")
        )
    text = render_with(staged, **dict(backbone_pretrained=False) | changes)
    front = front_matter(text)
    assert (front.get("base_model"), front.get("base_model_relation")) == (base, relation)
    assert {key: value for key, value in front.items() if key.startswith("license")} == licence
    assert ("carry its licence on" in text) == (base is not None) == (f"](https://huggingface.co/{base}" in text)


def test_a_backbone_without_a_licence_says_so(staged, monkeypatch):
    cfg = dataclasses.replace(timm.get_pretrained_cfg("convnext_tiny"), license=None)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    text = render_with(staged, model="ride", backbone="convnext_tiny", backbone_pretrained=True)
    assert front_matter(text)["license_name"] == "unknown" and "ask its authors before you use them" in text


def test_example_images_of_the_widget(staged):
    own = dict(file="example_tail.png", train_images=1200, output=[dict(label="bee", score=0.9)]) | {"class": "bee"}
    expected = dict(src="example_tail.png", example_title="bee (1,200 training images)", output=own["output"])
    assert widget(dict(examples=[own], data=dict(dataset="cifar100"))) == [expected]
    (drawn,) = widget(dict(examples=[own | dict(drawn=True)]))
    assert drawn["example_title"] == "bee, drawn (1,200 training images)"
    assert [example["example_title"] for example in widget(dict(data=dict(dataset="cifar100")))] == ["Tiger"]
    assert "widget" not in front_matter(render(staged))  # images of one's own are not published


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (dict(seconds=59.6), "Training took 60 seconds on a GPU, with its evaluations."),
        (dict(seconds=7199, num_processes=2),
         "Training took 120 minutes on a GPU in 2 processes, with its evaluations."),
        (dict(seconds=90, seeds=[dict(seconds=90), dict(seconds=8910)]),
         "Training took 2 minutes on a GPU, with its evaluations; its 2 seeds took 2.5 hours."),
        (dict(seconds=90, seeds=[dict(seconds=90), {}]), "Training took 2 minutes on a GPU, with its evaluations."),
        (dict(seconds=90, source="a.b", source_seconds=9000),
         "Training took 2 minutes on a GPU, with its evaluations. Before that, the weights it started from took "
         "2.5 hours."),
        (dict(seconds=90, source=None),
         "Training took 2 minutes on a GPU, with its evaluations. The training of the weights it started from is not "
         "included."),
    ],
)  # fmt: skip
def test_the_time_of_training(results, sentence):
    assert compute(dict(device="a GPU") | results) == sentence
    assert ("is not included" in compute(dict(device="a GPU") | results, Base("timm/vit", "mit"))) == (
        "source_seconds" not in results
    )
