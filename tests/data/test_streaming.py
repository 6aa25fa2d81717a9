"""Streams: every listed image once over processes and workers, the same steps on each, exact repetition."""

from itertools import chain

import datasets
import pytest
import torch
from listed import LISTS, jpeg, known_lists, shade, write_lists, write_rows
from torch.utils.data import DataLoader, IterableDataset

from ride_timm.data.augment.policies import get_policy
from ride_timm.data.load import hold_out, load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.data.loaders.workers import ignore_interrupts
from ride_timm.errors import InputError, RunError
from ride_timm.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    known_lists(monkeypatch, "imagenet_lt")
    # for interpreters on their way out; not in datasets 4.0
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def data(tmp_path):
    return load(tmp_path, 3)


def load(tmp_path, num_shards, **settings):
    rows, lists = write_rows(tmp_path / "hub", num_shards), write_lists(tmp_path / "lists")
    return load_longtail("imagenet_lt", rows, annotations=lists, streaming=True, shuffle_buffer=5, **settings)


def loader(images, train=True, **settings):
    settings = dict(batch_size=4, seed=0, input_size=8) | settings
    return make_loader(images, "imagenet", train=train, **settings)


def shades(images):
    """Each image's grey, from the normalised input."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (255 * (images * std + mean)).mean((1, 2, 3)).round().int().tolist()


def listed(split):
    return sorted((shade(line.split()[0]), int(line.split()[1])) for line in LISTS[split])


def found(batches):
    return sorted((g, c) for images, labels in batches for g, c in zip(shades(images), labels.tolist(), strict=True))


def close(pairs, expected):
    """The same images, up to the rounding of a JPEG's grey."""
    return len(pairs) == len(expected) and all(
        abs(a - b) <= 2 and c == d for (a, c), (b, d) in zip(pairs, expected, strict=True)
    )


@pytest.mark.parametrize(("num_shards", "num_processes", "num_workers"), [(3, 1, 0), (3, 3, 0), (3, 2, 0), (4, 2, 2)])
def test_evaluation_sees_every_listed_image_once(tmp_path, num_shards, num_processes, num_workers):
    test = load(tmp_path, num_shards).test
    ranks = [
        loader(test, train=False, rank=rank, num_processes=num_processes, num_workers=num_workers)
        for rank in range(num_processes)
    ]
    assert all(rank.loader.worker_init_fn is ignore_interrupts for rank in ranks)
    parts = [list(rank) for rank in ranks]
    assert close(found(chain(*parts)), listed("test"))


class Keys(IterableDataset):
    """The keys of a part, split over workers."""

    def __init__(self, part):
        self.part = part

    def __iter__(self):
        return (key for _, key, _ in self.part)


@pytest.mark.parametrize(
    ("num_shards", "num_processes", "num_workers"), [(3, 1, 0), (3, 3, 0), (3, 2, 0), (4, 2, 2), (3, 2, 2)]
)
def test_parts_in_training_are_disjoint_and_complete(tmp_path, num_shards, num_processes, num_workers):
    train = load(tmp_path, num_shards).train
    for number in (0, 5):
        keys = []
        for rank in range(num_processes):
            part = train.part(rank, num_processes, shuffle_buffer=4, seed=3)
            part.set_pass(number)
            keys += DataLoader(Keys(part), batch_size=None, num_workers=num_workers)
        assert sorted(keys) == sorted(train.keys)


def test_one_process_trains_on_every_image_once_in_an_order_of_the_epoch(data):
    """The images are plain, so augmentation changes their brightness alone: labels and counts distinguish them."""
    first, again = loader(data.train), loader(data.train)
    orders = {}
    for epoch in (0, 1):
        first.set_epoch(epoch)
        again.set_epoch(epoch)
        one, two = list(first), list(again)
        assert [len(labels) for _, labels in one] == [4, 4, 4, 1] and len(first) == 4
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(one, two, strict=True))
        orders[epoch] = torch.cat([labels for _, labels in one]).tolist()
        assert sorted(orders[epoch]) == sorted(data.train.labels.tolist())
        assert one[0][0].shape == (4, 3, 8, 8) and one[0][0].is_contiguous(memory_format=torch.channels_last)
    first.set_epoch(0)
    assert torch.cat([labels for _, labels in first]).tolist() == orders[0]
    part = data.train.part(0, 1, shuffle_buffer=5)
    keys = {}
    for epoch in (0, 1):
        part.set_pass(epoch)
        keys[epoch] = [key for _, key, _ in part]
    assert keys[0] != keys[1]


def test_augmentation_depends_on_epoch_and_image_alone(data):
    """With batches of one, an image looks the same whichever process shows it."""

    def seen(num_processes):
        ranks = [loader(data.train, batch_size=num_processes, num_processes=num_processes, rank=rank)
                 for rank in range(num_processes)]  # fmt: skip
        return {images.numpy().tobytes() for rank in ranks for images, _ in rank}

    assert seen(3) <= seen(1) and len(seen(1)) == 13


@pytest.mark.parametrize("num_processes", [2, 3])
def test_all_processes_take_the_same_steps_in_training(data, num_processes):
    ranks = [loader(data.train, batch_size=6, num_processes=num_processes, rank=r) for r in range(num_processes)]
    sizes = [[len(labels) for _, labels in rank] for rank in ranks]
    assert len({len(rank) for rank in ranks}) == 1 and all(len(s) == len(ranks[0]) for s in sizes)
    assert [sum(step) for step in zip(*sizes, strict=True)][:2] == [6, 6]


def test_two_views_of_a_stream_are_those_of_two_loaders(data):
    plain, strong = get_policy("imagenet"), get_policy("imagenet").strong("rand-m5-mstd0.5")
    settings = dict(train=True, batch_size=6, seed=0, input_size=8, rank=1, num_processes=2)
    both = make_loader(data.train, strong, views=2, **settings)
    alone = [make_loader(data.train, one, **settings) for one in (plain, strong)]
    for (images, labels), (weak, targets), (changed, _) in zip(both, *alone, strict=True):
        assert torch.equal(labels, targets) and torch.equal(images, torch.cat([weak, changed]))
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_held_out_part_and_its_rest_are_streams(data):
    rest, held = hold_out(data.train, 0.3, 0)
    seen = [list(part.part(0, 1)) for part in (rest, held)]
    assert sorted(key for part in seen for _, key, _ in part) == sorted(data.train.keys)
    assert len(seen[1]) == len(held) > 0


def test_what_a_stream_cannot_do_is_refused(tmp_path, data):
    with pytest.raises(InputError, match="sampler=square_root draws single images"):
        loader(data.train, sampler="square_root")
    with pytest.raises(InputError, match="holds all images in memory"):
        make_loader(data.train, "cifar", train=True, batch_size=4, seed=0)
    lists = write_lists(tmp_path / "more", lists=LISTS | {"test": [*LISTS["test"], "val/n01440764/other.JPEG 0"]})
    short = load_longtail("imagenet_lt", tmp_path / "hub", annotations=lists, streaming=True)
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"image": ["a"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="written by save_to_disk"):
        load_longtail("imagenet_lt", tmp_path / "saved", annotations=tmp_path / "lists", streaming=True)
    with pytest.raises(RunError, match="gave 9 of the 10 listed images"):
        list(loader(short.test, train=False))
    lines = [*LISTS["train"], LISTS["train"][0].replace(".JPEG", "x.JPEG")]
    longer = dict(annotations=write_lists(tmp_path / "longer", lists=LISTS | {"train": lines}))
    train = load_longtail("imagenet_lt", tmp_path / "hub", streaming=True, **longer).train
    with pytest.raises(RunError, match=rf"gave {len(lines) - 1} of the {len(lines)} listed images of 'train'"):
        list(loader(train))


def test_a_part_without_a_listed_image_is_refused_not_waited_for(tmp_path):
    lines = [line.replace(".JPEG", "x.JPEG") for line in LISTS["train"]]
    rows, lists = write_rows(tmp_path / "hub"), write_lists(tmp_path / "lists", lists=LISTS | {"train": lines})
    train = load_longtail("imagenet_lt", rows, annotations=lists, streaming=True).train
    with pytest.raises(RunError, match="holds none of the listed images"):
        next(iter(loader(train)))


def test_images_that_cannot_be_read_are_named(tmp_path):
    from datasets import Dataset, Features, Value

    rows, lists = write_rows(tmp_path / "hub", 1), write_lists(tmp_path / "lists")
    broken = [{"bytes": b"junk", "path": "ILSVRC2012_val_00000000_n01440764.JPEG"}]
    features = Features(image=datasets.Image(), label=Value("int64"))
    path = rows / "data" / "validation-00000-of-00001.parquet"
    Dataset.from_dict({"image": broken, "label": [0]}, features=features).to_parquet(path)
    data = load_longtail("imagenet_lt", rows, annotations=lists, streaming=True)
    with pytest.raises(RunError, match=r"image ILSVRC2012_val_00000000 of the stream cannot be read \(Unidentified"):
        list(loader(data.test, train=False))


def write_named(root, **splits):
    """Parquet files whose rows carry these paths; None is a row without an image."""
    for name, paths in splits.items():
        for shard, part in enumerate(paths):
            images = [path and {"bytes": jpeg(path), "path": path} for path in part]
            rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
            (root / "data").mkdir(parents=True, exist_ok=True)
            rows.to_parquet(root / "data" / f"{name}-{shard:05d}-of-{len(paths):05d}.parquet")
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_two_rows_of_one_name_are_refused_not_trained_on(tmp_path, train, num_workers):
    """Every class numbers its own images, and one shard holds one class: each worker meets the name once."""
    shards = [[f"train/{c}/{i}.png" for i in range(4)] for c in ("cat", "dog")]
    rows = write_named(tmp_path / "hub", train=shards, test=shards)
    lines = ["train/cat/1.png 0", "train/cat/3.png 0", "train/dog/0.png 1"]
    lists = write_lists(tmp_path / "lists", "mine", dict(train=lines, test=lines))
    data = load_longtail("mine", rows, annotations=lists, streaming=True, imb_type="none")
    with pytest.raises(RunError, match=r"two rows of split 'train' have the name of .* image, [013], .* --streaming"):
        list(loader(data.train, train, batch_size=1, num_workers=num_workers))
    plain = load_longtail("mine", rows, annotations=lists, imb_type="none")
    assert plain.train.rows.tolist() == [1, 3, 4]


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_without_an_image_are_none_of_the_listed(tmp_path, streaming):
    rows = write_named(tmp_path / "hub", train=[[None, "a/1.png", None, "b/2.png"]], test=[["b/2.png", None]])
    lists = write_lists(tmp_path / "lists", "mine", dict(train=["a/1.png 0", "b/2.png 1"], test=["b/2.png 1"]))
    data = load_longtail("mine", rows, annotations=lists, streaming=streaming, imb_type="none")
    assert sorted(torch.cat([labels for _, labels in loader(data.train)]).tolist()) == [0, 1]
    assert [labels.tolist() for _, labels in loader(data.test, train=False)] == [[1]]


def test_a_stream_without_an_image_or_without_names_is_refused(tmp_path):
    lists = write_lists(tmp_path / "lists", "mine", dict(train=["a/1.png 0"], test=["a/1.png 0"]))
    rows = write_named(tmp_path / "hub", train=[[None, None]], test=[[None]])
    with pytest.raises(InputError, match=r"split 'train' cannot be streamed .* carry no file names"):
        load_longtail("mine", rows, annotations=lists, streaming=True, imb_type="none")


def test_both_stages_train_on_a_stream(train, tmp_path):
    rows, lists = write_rows(tmp_path / "hub", 2), write_lists(tmp_path / "lists")
    flags = f"--dataset imagenet_lt --data-dir {rows} --annotations {lists} --imb-type none --streaming"
    flags += " --model test_ride_resnet --augment imagenet --input-size 64 --batch-size 4 --epochs 1 --workers 0"
    flags += f" --no-router-balanced --router-batch-size 4 --router-epochs 1 --threads 1 --output {tmp_path}/run"
    assert train(flags.split()) == 0
    assert set(RunFolder(tmp_path / "run").results()["stages"]) == {"experts", "router"}
