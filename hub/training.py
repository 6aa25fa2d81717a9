"""What a card says of how a release was trained: method, command, settings, and whom to cite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from folder import LICENCE, Staged

from ride_timm.data.datasets import BALANCED
from ride_timm.losses import LOSSES, PerExpertPriorLoss
from ride_timm.training.recipe import Recipe

METHODS = {  # by loss: name, paper, and what the loss does
    "ride": ("RIDE", "2010.01809", "drives them apart and knows how rare each class is"),
    "ldam": ("LDAM", "1906.07413", "asks for a wider margin the rarer a class is"),
    "ce": ("cross entropy", None, "treats all images alike"),
    "cb_ce": ("class-balanced cross entropy", "1901.05555", "counts the images of rare classes more"),
    "focal": ("the focal loss", "1708.02002", "counts images more that are hard to tell"),
    "cb_focal": ("the class-balanced focal loss", "1901.05555", "counts images of rare classes more, and hard ones"),
    "balanced_softmax": ("balanced softmax", "2007.10740", "adjusts the logits to the classes' prior"),
    "logit_adjustment": ("logit adjustment", "2007.07314", "adjusts the logits to the classes' prior"),
    "sade": ("SADE", "2107.09249", "aims each of them at another distribution of the classes"),
    "balpoe": ("BalPoE", "2206.05260", "adjusts each of them to the classes' prior by a strength of its own"),
    "mdcs": ("MDCS", "2308.09922", "adjusts each of them to the classes' prior by a strength of its own and lets each "
                                   "learn a strongly augmented image from a weakly augmented one"),
}  # fmt: skip
DECOUPLED = {  # by `decouple` of the recipe: name and paper
    "crt": ("cRT", "1910.09217"),
    "lws": ("LWS", "1910.09217"),
    "tau_norm": ("tau-normalization", "1910.09217"),
    "logit_adjustment": ("logit adjustment", "2007.07314"),
}
_CLASS_BLIND = ("ce", "focal")  # losses that know nothing of how rare a class is
_LOSS_KEYS = {  # arguments of losses that a table shows, and how
    "additional_diversity_factor": "diversity factor {:g}",
    "reweight_epoch": "re-weighted after epoch {:g}",
    "gamma": "gamma {:g}",
    "tau": "tau {:g}",
    "inverse_tau": "inverse tau {:g}",
    "consistency": "consistency {:g}",
}


def numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _cited(name: str, paper: str | None) -> str:
    return f"{name} ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else name


def _moved(recipe: Recipe, args: dict[str, Any]) -> bool:
    """Whether the experts were moved to one class prior after their training."""
    offsets = issubclass(LOSSES[recipe.loss].loss, PerExpertPriorLoss)
    return offsets and recipe.decouple == "none" and bool(args.get("class_affine"))


def summary(
    config: dict[str, Any],
    args: dict[str, Any],
    pretty: str,
    home: str | None,
    results: dict[str, Any],
    recipe: Recipe | None,
) -> str:
    """The first paragraph of a card. args: the model's own arguments; pretty, home: name and page of its data."""
    experts, network = args["num_experts"], config["architecture"].removeprefix("ride_")
    data = f"[{pretty}]({home})" if home else pretty
    router = (
        " A router sends an image to the next expert only where the answer so far is likely to be wrong."
        if args.get("router")
        else ""
    )
    origin = (
        f" These are the weights of the authors' own checkpoint ([model zoo]({results['claimed']['url']})), converted."
        if results.get("claimed")
        else ""
    )
    loss, decoupled = (recipe.loss, recipe.decouple) if recipe else ("ride", "none")
    name, paper, effect = METHODS[loss]
    if recipe and loss == "ride" and recipe.additional_diversity_factor >= 0:
        effect = "knows how rare each class is"
    body = f"a {network} with one expert."
    if experts > 1:
        body = f"{experts} experts share the first stages of a {network} and answer as the mean of their logits"
        body += f"; the loss {effect}."
    if decoupled != "none":
        heads = "The heads were" if experts > 1 else "Its head was"
        body += f" {heads} re-balanced afterwards by {_cited(*DECOUPLED[decoupled])}."
    by = _cited(name, paper)
    return f"An image classifier for long-tailed data, trained on {data} by {by}: {body}{router}{origin}"


def training(recipe: Recipe | None, results: dict[str, Any]) -> str:
    """Where the weights come from, how long they were trained, and of which epoch the numbers are."""
    if recipe is None:
        origin = results.get("claimed")
        if origin:
            by = f"By the code of the paper's authors: {origin['training']}."
            return f"{by} Here the checkpoint was only converted, tensor by tensor."
        return "From a checkpoint in the format of the authors' code, converted here tensor by tensor."
    parts, stages = [], results["stages"]
    if "experts" in stages:
        what = "the experts" if recipe.num_experts > 1 else "the network"
        if recipe.decouple != "none":
            what = "the heads of trained experts" if recipe.num_experts > 1 else "the head of a trained network"
        epochs = stages["experts"]["epochs"]
        parts.append(f"{what} for {_epochs(epochs)}" if epochs else f"{what}, re-balanced in closed form")
    if "router" in stages:
        then = "then the router" if parts else "a router for trained experts"
        parts.append(f"{then} for {_epochs(stages['router']['epochs'])}")
    if "source" in results:
        parts[0] += f" (from the weights of {began_from(results)})"
    told = f"With `ride_timm`: {', '.join(parts)}. {how_chosen(recipe, stages)}"
    if as_given(results):
        told += (
            f" The training images are a ready-made long-tailed version of {recipe.dataset}, taken as it is; "
            "`--imb-type exp` selects from the balanced set, maybe other images."
        )
    return told


def as_given(results: dict[str, Any]) -> bool:
    """Whether a set that is balanced on the Hub was read from a copy that was long-tailed already."""
    data, long_tailed = results.get("data", {}), len(set(results.get("class_counts", ()))) > 1
    return data.get("dataset") in BALANCED and data.get("imb_type") == "none" and long_tailed


def began_from(results: dict[str, Any]) -> str:
    """Where a release began that did not begin from scratch."""
    return f"`{results['source']}`" if results["source"] else "an earlier run"


def _epochs(number: int) -> str:
    return "one epoch" if number == 1 else f"{number} epochs"


def how_chosen(recipe: Recipe, stages: dict[str, Any]) -> str:
    """Which epoch the numbers are of. stages: those of results.json."""
    if not any(stage["epochs"] for stage in stages.values()):
        return "The numbers were measured on the test set."
    if recipe.select == "last":
        return "The numbers are those of the last epoch, on the test set."
    chosen_on = "validation images" if recipe.use_val else "held-out training images"
    return f"The epoch was chosen on {chosen_on}; the test set chose nothing."


def command(recipe: Recipe | None, results: dict[str, Any]) -> str:
    """The command that trains such a release, from its recipe."""
    if recipe is None:
        return ""
    stage = "" if "router" in results["stages"] or recipe.num_experts == 1 else " --stage experts"
    start = f" --from {results.get('source') or 'path/to/the/trained/run'}"
    if "experts" not in results["stages"]:
        stage = f" --stage router{start}"
    elif recipe.decouple != "none" or "source" in results:
        stage += start
    if recipe.distillation and recipe.decouple == "none" and "experts" in results["stages"]:
        stage += " --teacher path/to/the/teacher"
    data = " --data-dir path/to/the/long-tailed/copy" if as_given(results) else ""
    return f"accelerate launch train_accelerate.py --recipe recipe.yaml{data}{stage}"


def settings(recipe: Recipe, args: dict[str, Any], stages: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of a card's table of settings. stages: those that were trained, of results.json."""
    rows = [("precision", {"no": "fp32"}.get(recipe.mixed_precision, recipe.mixed_precision))]
    if "experts" in stages:
        schedule, decays = recipe.schedule, ", ".join(map(str, recipe.decay_epochs))
        if schedule == "step":
            schedule = f"x {recipe.decay_rate:g} after epochs {decays}" if decays else "constant"
        rows = [
            ("loss", _loss(recipe, args)),
            ("epochs, batch", f"{recipe.epochs}, {recipe.batch_size} images"),
            ("optimizer", f"{recipe.optimizer}, weight decay {recipe.weight_decay:g}"),
            ("learning rate", f"{recipe.lr:g}, {recipe.warmup_epochs} epochs of warm-up, {schedule}"),
            ("augmentation", _augmentation(recipe)),
            *([("weights", f"moving average, decay {recipe.ema_decay:g}")] if recipe.ema_decay else []),
            *rows,
        ]
    if recipe.decouple != "none":
        stage, heads = recipe.stage("experts"), recipe.decouple
        if stage.epochs:
            heads += f", {stage.epochs} epochs of class-balanced batches of {stage.batch_size}"
            heads += f", learning rate {stage.lr:g}"
        else:
            heads += f", tau {recipe.decouple_tau:g}"
        rows.append(("heads, re-balanced", heads))
    if "router" in stages:
        kind = "class-balanced batches of {}" if recipe.router_balanced else "batches of {}, as images come"
        facts = [f"{recipe.router_epochs} epochs of {kind.format(recipe.router_batch_size)}"]
        facts += [] if recipe.router_optimizer == "sgd" else [recipe.router_optimizer]
        facts += [f"learning rate {recipe.router_lr:g}", f"positive weight {recipe.pos_weight:g}"]
        rows.append(("router", ", ".join(facts)))
    return rows


def _loss(recipe: Recipe, args: dict[str, Any]) -> str:
    values = recipe.loss_args
    if values.get("reweight_epoch", 0) < 0 or not values.get("reweight", True):
        values.pop("reweight_epoch", None)
    told = [recipe.loss, *(text.format(values[key]) for key, text in _LOSS_KEYS.items() if key in values)]
    if "taus" in values:
        told.insert(1, f"taus {numbers(values['taus'])}")
    if recipe.distillation:
        told.append("with a teacher")
    if _moved(recipe, args):
        told.append("the experts moved to the class prior of their mean afterwards")
    return ", ".join(told)


def _augmentation(recipe: Recipe) -> str:
    more = {
        "timm's {}": recipe.auto_augment,
        "random erasing of {:.0%} of the images": recipe.random_erasing,
        "mixup {:g}": recipe.mixup_alpha,
        "CutMix {:g}": recipe.cutmix_alpha,
        "labels smoothed by {:g}": recipe.label_smoothing,
    }
    return ", ".join([recipe.augment, *(text.format(value) for text, value in more.items() if value)])


def rare_classes(recipe: Recipe | None) -> str:
    """What the training does about rare classes, and what follows from it in use."""
    decoupled = recipe is not None and recipe.decouple != "none"
    if decoupled or recipe is None or recipe.loss not in _CLASS_BLIND:
        return (
            f"The {'re-balancing' if decoupled else 'loss'} pushes towards rare classes on purpose. Where rare classes "
            "are rare in use as well, this costs accuracy on the\n  frequent ones, and predicted probabilities are not "
            "those of the deployment: check their calibration on data of your own."
        )
    teacher = ": only its teacher may" if recipe.distillation else ""
    return (
        f"The loss does not know how rare a class is{teacher}. Where all classes are equally frequent, those that are\n"
        "  rare in training are answered less often than they should be; `--decouple logit_adjustment` shifts that "
        "without training."
    )


def licence(staged: Staged, recipe: Recipe | None, args: dict[str, Any]) -> str:
    """Licence, and whom to cite besides RIDE, whose entry follows."""
    if staged.has(LICENCE):
        return (
            "The checkpoint is the work of the paper's authors, published with their code under the MIT licence, whose "
            "notice stands in [LICENSE](LICENSE); `ride_timm`, which converted it, is an independent implementation "
            "under the MIT licence. Please cite the paper:"
        )
    name, paper, _ = METHODS[recipe.loss if recipe else "ride"]
    others = {} if paper in (None, METHODS["ride"][1]) else {_cited(name, paper): "whose loss trained this model"}
    if recipe is not None and recipe.decouple != "none":
        cited = _cited(*DECOUPLED[recipe.decouple])
        others[cited] = " and ".join(filter(None, (others.get(cited), "which re-balanced it")))
    ours = "MIT. `ride_timm` is an independent implementation of a method by others; please cite"
    if not others:
        return f"{ours} their paper:"
    papers = "; ".join(f"the paper of {cited}, {why}" for cited, why in others.items())
    has = "trunk and experts it shares" if args["num_experts"] > 1 else "networks it comes from"
    return f"{ours} {papers}; and that of RIDE, whose {has}:"
