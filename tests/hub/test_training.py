"""What a card says of method, command, settings and papers, for every way of training."""

import dataclasses
import json
import shutil

import pytest
from card import render
from folder import HERE
from release_files import TAG, set_json
from stage import stage
from tables import render_results
from training import DECOUPLED, METHODS

from ride_timm.losses import LOSSES
from ride_timm.training.recipe_keys import DECOUPLINGS


def render_with(staged, **changes):
    recipe = dataclasses.replace(staged.recipe(), **changes)
    (staged.path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    data = staged.json("results.json")["data"]
    set_json(staged.path / "results.json", data=data | {key: changes[key] for key in data.keys() & changes})
    return render(staged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(loss="ride"), ["by RIDE ([arXiv:2010.01809]", "drives them apart", "please cite their paper:"]),
        (dict(loss="ride"), ["| loss | ride, diversity factor -0.45, re-weighted after epoch 160 |"]),
        (dict(additional_diversity_factor=0.0, reweight=False), ["loss knows how rare", "diversity factor 0 |"]),
        (dict(loss="ldam"), ["by LDAM (", "| ldam, re-weighted after epoch 160 |", "The loss pushes towards rare"]),
        (dict(loss="balpoe"), ["by BalPoE ([arXiv:2206.05260]", "the paper of BalPoE (", "balpoe, taus 0, 1, 2 |"]),
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
        (dict(loss="logit_adjustment", decouple="logit_adjustment"), ["whose loss trained this model and which re"]),
        (dict(decay_epochs=()), ["| 0.1, 5 epochs of warm-up, constant |"]),
        (dict(mixup_alpha=0.4, random_erasing=0.5), ["| cifar, random erasing of 50% of the images, mixup 0.4 |"]),
        (dict(select="best", holdout=0.1), ["The epoch was chosen on held-out training images; the test set chose"]),
        (dict(select="best", use_val=True), ["The epoch was chosen on validation images;"]),
        (dict(ema_decay=0.999), ["| weights | moving average, decay 0.999 |"]),
        (dict(dataset="cifar10", imb_type="none"), ["recipe.yaml --data-dir path/to", "cifar10, taken as it is;"]),
    ],
)  # fmt: skip
def test_the_card_names_the_method(staged, changes, said):
    text = render_with(staged, **changes)
    assert [words for words in said if words not in text] == []
    assert ("re-balanced" in text) == ("decouple" in changes)


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        (dict(router=None), {}, ["recipe.yaml --stage experts\n", "the experts for 3 epochs. The", "| loss |"]),
        (dict(experts=None), {}, ["a router for trained experts for 5 epochs. The", "--stage router --from path"]),
        (dict(experts=1, router=None), dict(decouple="crt"), ["the heads of trained experts for one epoch. The"]),
        (dict(experts=0), dict(decouple="tau_norm"), ["in closed form, then the router for 5 epochs. The numbers are"]),
        (dict(experts=0, router=None), dict(decouple="tau_norm"), ["in closed form. The numbers were measured on"]),
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
    assert ("| loss |" in text) == ("experts" in results["stages"])


def test_the_card_says_where_experts_were_moved(make_run, tmp_path):
    kwargs = dict(router=True, top_choices_num=3)
    plain, aligned = make_run(**kwargs), make_run(**kwargs, class_affine=True)
    for run, loss, moved in ((plain, "balpoe", False), (aligned, "balpoe", True), (aligned, "ride", False)):
        text = render_with(stage(run, TAG, tmp_path), loss=loss)
        assert ("the experts moved to the class prior of their mean" in text) == moved


def test_the_card_of_one_expert(make_run, tmp_path):
    staged = stage(make_run(num_experts=1), TAG, tmp_path)
    text = render_with(staged, loss="cb_ce", decouple="lws")
    assert "class-balanced cross entropy (" in text and "with one expert. Its head was re-balanced" in text
    assert "the head of a trained network for 3 epochs" in text and "whose networks it comes from:" in text


def test_every_method_has_its_line():
    assert set(METHODS) == set(LOSSES) and set(DECOUPLED) | {"none"} == set(DECOUPLINGS)


@pytest.mark.parametrize("stages", [("experts", "router"), ("experts",), ("router",)])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("ride_resnet32.cifar100_lt100_zoo", "ride_resnet32.cifar100_lt100_zoo"),
        ("ride_resnet32", "ride_resnet32.cifar100_lt100"),  # its default tag
        ("hf-hub:somebody/beetles", "hf-hub:somebody/beetles"),
        (HERE / "ride_resnet32.fashion_lt", "ride_resnet32.fashion_lt"),  # the very weights of the release
        ("runs/ride_resnet32.fashion_lt", None),
        ("/home/somebody/runs/beetles", None),
    ],
)
def test_a_release_says_that_it_began_from_weights_and_from_which(run, tmp_path, source, told, stages):
    """A folder of somebody's machine is not told, only that there was one."""
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    kept = {name: json.loads((run / "results.json").read_text())["stages"][name] for name in stages}
    set_json(begun / "results.json", source=str(source), stages=kept)
    staged = stage(begun, TAG, tmp_path / "hub")
    assert staged.json("results.json")["source"] == told
    card = (staged.path / "README.md").read_text(encoding="utf-8")
    start = f"`{told}`" if told else "an earlier run"
    assert card.count(f" (from the weights of {start})") == 1
    assert f" --from {told or 'path/to/the/trained/run'}\n" in card
    assert ("--stage router --from" in card) == (stages == ("router",))
    assert f"epochs, from the weights of {start}, seed 0" in render_results(tmp_path / "hub")
