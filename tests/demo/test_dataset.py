"""The demo's data: nothing held out is trained on, every answer is true, every cell is legible."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from megatron_vlm.demo import sources
from megatron_vlm.demo.dataset import KINDS, Summary, build
from megatron_vlm.errors import ConfigError, DataError, UserError

pytestmark = pytest.mark.unit

TRAIN, HELDOUT = 1200, 400
PACKAGE_PICTURES = {
    "scikit-image": Path(skimage.__file__).parent / "data",
    "scikit-learn": Path(sklearn.__file__).parent / "datasets/images",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    def refuse(*_: Any) -> None:
        raise AssertionError("the demo's data must not touch the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return build(tmp_path_factory.mktemp("demo") / "data", 11, TRAIN, HELDOUT)


def read(built: Summary, split: str) -> list[dict[str, Any]]:
    """Each sample with its picture, its answer and its provenance."""
    folder = Path(built.out_dir)
    samples = json.loads((folder / f"{split}.json").read_text())
    facts = [
        json.loads(line) for line in (folder / split / "provenance.jsonl").read_text().splitlines()
    ]
    assert [sample["id"] for sample in samples] == [fact["id"] for fact in facts]
    return [
        {
            **sample,
            "facts": fact,
            "picture": Image.open(folder / sample["image"]),
            "answer": sample["conversations"][1]["value"],
        }
        for sample, fact in zip(samples, facts, strict=True)
    ]


def of_kind(rows: list[dict[str, Any]], *prefixes: str) -> list[dict[str, Any]]:
    found = [row for row in rows if row["kind"].startswith(prefixes)]
    assert found
    return found


def test_nothing_held_out_is_trained_on(built: Summary) -> None:
    train, heldout = read(built, "train"), read(built, "heldout")

    def digits(rows: list[dict[str, Any]]) -> set[int]:
        return {index for row in of_kind(rows, "digits_") for index in row["facts"]["digits"]}

    assert len(digits(train)) > 1000
    assert len(digits(heldout)) > 250
    assert digits(train).isdisjoint(digits(heldout))

    for mine in of_kind(train, "photograph"):
        for other in of_kind(heldout, "photograph"):
            if mine["facts"]["photograph"] == other["facts"]["photograph"]:
                a, b = mine["facts"]["crop"], other["facts"]["crop"]
                wide = min(a[2], b[2]) - max(a[0], b[0])
                high = min(a[3], b[3]) - max(a[1], b[1])
                assert wide <= 0 or high <= 0, (mine["facts"], other["facts"])

    for key in ("line", "words"):
        texts = [
            {row["facts"][key] for row in of_kind(rows, "text_line")} for rows in (train, heldout)
        ]
        assert texts[0].isdisjoint(texts[1])


def test_every_split_has_all_ten_digits_and_photographs(built: Summary) -> None:
    target = load_digits().target
    for split in ("train", "heldout"):
        rows = read(built, split)
        seen = Counter(
            int(target[index])
            for row in of_kind(rows, "digits_")
            for index in row["facts"]["digits"]
        )
        assert len(seen) == 10
        assert max(seen.values()) < 1.6 * min(seen.values())
    shown = {row["facts"]["photograph"] for row in of_kind(read(built, "train"), "photograph")}
    assert len(shown) == built.photographs == 14


def test_answers_follow_from_the_sources(built: Summary) -> None:
    target = load_digits().target
    for split in ("train", "heldout"):
        rows = read(built, split)
        for row in of_kind(rows, "digits_"):
            values = [int(target[index]) for index in row["facts"]["digits"]]
            expected = {
                "digits_count_grid": str(len(values)),
                "digits_sum_grid": str(sum(values)),
            }.get(row["kind"], " ".join(map(str, values)))
            assert row["answer"] == expected
            assert 1 <= len(values) <= 5
        for row in of_kind(rows, "text_line"):
            assert row["answer"] in row["facts"]["line"]
            assert 1 <= len(row["answer"].split()) <= 3
            folder, name = row["facts"]["file"].split("/")
            path = Path("/usr/share") / folder / name
            if path.exists():
                line = path.read_text().splitlines()[row["facts"]["line_number"] - 1]
                assert " ".join(line.split()) == row["facts"]["line"]


def test_format_is_llava(built: Summary) -> None:
    rows = json.loads((Path(built.out_dir) / "heldout.json").read_text())
    assert len(rows) == HELDOUT
    questions = {kind.name: kind.question for kind in KINDS}
    for row in rows:
        assert set(row) == {"id", "image", "conversations", "kind"}
        human, gpt = row["conversations"]
        assert human == {"from": "human", "value": "<image>\n" + questions[row["kind"]]}
        assert gpt["from"] == "gpt"
        assert gpt["value"]
        with Image.open(Path(built.out_dir) / row["image"]) as picture:
            assert picture.format == "PNG"
            assert picture.mode == "RGB"


def test_shares_are_kept(built: Summary) -> None:
    assert sum(kind.share for kind in KINDS) == pytest.approx(1)
    assert built.train == Counter(row["kind"] for row in read(built, "train"))
    assert built.train == {kind.name: round(kind.share * TRAIN) for kind in KINDS}
    assert sum(built.heldout.values()) == HELDOUT


def cells(picture: Image.Image) -> np.ndarray:
    """Grey cells `[rows, columns, 28, 28]` of a picture."""
    grey = np.asarray(picture.convert("L"), dtype=np.float64)
    rows, columns = grey.shape[0] // 28, grey.shape[1] // 28
    return grey.reshape(rows, 28, columns, 28).transpose(0, 2, 1, 3)


def test_on_the_grid_each_digit_fills_its_own_cell(built: Summary) -> None:
    images = load_digits().images
    around = Counter[str]()
    likeness = []
    for row in of_kind(read(built, "train"), "digits_read_grid", "digits_count", "digits_sum"):
        width, height = row["picture"].size
        assert width % 28 == 0
        assert height % 28 == 0
        assert width * height >= 3136
        grid = cells(row["picture"])
        inked = {tuple(place) for place in np.argwhere(grid.std(axis=(2, 3)) > 2)}
        places = [tuple(place) for place in row["facts"]["cells"]]
        assert inked == set(places)
        assert all(b == (a[0], a[1] + 1) for a, b in pairwise(places))
        around["left"] += places[0][1] > 0
        around["right"] += places[-1][1] < grid.shape[1] - 1
        around["above"] += places[0][0] > 0
        around["below"] += places[0][0] < grid.shape[0] - 1
        for place, index in zip(places, row["facts"]["digits"], strict=True):
            small = Image.fromarray(255 - grid[place]).resize((8, 8), Image.Resampling.BOX)
            likeness.append(np.corrcoef(np.asarray(small).ravel(), images[index].ravel())[0, 1])
    assert min(around[side] for side in ("left", "right", "above", "below")) > 50, around
    assert np.median(likeness) > 0.85
    assert np.min(likeness) > 0.4


def test_off_the_grid_nothing_lines_up(built: Summary) -> None:
    rows = of_kind(read(built, "train"), "digits_read_off_grid")
    sides = set()
    for row in rows:
        width, height = row["picture"].size
        assert width % 28
        assert height % 28
        assert width * height >= 3136
        boxes = row["facts"]["boxes"]
        assert all(a[2] <= b[0] for a, b in pairwise(boxes))
        grey = np.asarray(row["picture"].convert("L"), dtype=np.float64)
        outside = np.ones_like(grey, dtype=bool)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert grey[top:bottom, left:right].std() > 2
            outside[top:bottom, left:right] = False
            sides.add(right - left)
        assert np.ptp(grey[outside]) <= 1
    assert len(sides) > 10


def test_photographs_are_the_crops_they_claim(built: Summary) -> None:
    aspects = []
    for row in of_kind(read(built, "heldout"), "photograph"):
        facts = row["facts"]
        path = PACKAGE_PICTURES[facts["package"]] / facts["photograph"]
        crop = Image.open(path).convert("RGB").crop(facts["crop"])
        shown, again = (
            np.asarray(picture.resize((4, 4), Image.Resampling.BOX), dtype=np.float64)
            for picture in (row["picture"], crop)
        )
        assert np.abs(shown - again).max() < 16
        ratio = crop.width / crop.height / (row["picture"].width / row["picture"].height)
        assert 0.9 < ratio < 1.1
        aspects.append(crop.width / crop.height)
    assert np.ptp(aspects) > 1


def test_cells_are_legible(built: Summary) -> None:
    """Comparing single cells with training cells reads the digits that are held out."""
    target = load_digits().target

    def examples(split: str) -> tuple[np.ndarray, np.ndarray]:
        inputs, values = [], []
        for row in of_kind(read(built, split), "digits_read_grid"):
            grid = cells(row["picture"])
            for place, index in zip(row["facts"]["cells"], row["facts"]["digits"], strict=True):
                cell = grid[tuple(place)].reshape(14, 2, 14, 2).mean(axis=(1, 3))
                inputs.append((cell.max() - cell).ravel() / np.ptp(cell))
                values.append(int(target[index]))
        return np.array(inputs), np.array(values)

    model = KNeighborsClassifier(3).fit(*examples("train"))
    assert model.score(*examples("heldout")) >= 0.95


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json"
    }


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in "abc")
    build(first, 3, 40, 20)
    build(again, 3, 40, 20)
    build(other, 4, 40, 20)
    assert checksums(first) == checksums(again)
    assert checksums(first) != checksums(other)


def test_an_earlier_build_is_replaced_and_other_files_are_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "data", 3, 30, 10)
    build(tmp_path / "data", 3, 12, 10)
    assert len(list((tmp_path / "data/train").glob("*.png"))) == 12

    foreign = tmp_path / "foreign"
    (foreign / "train").mkdir(parents=True)
    (foreign / "train/000001.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="foreign/train: exists and was not written by the demo"):
        build(foreign, 3, 12, 10)
    assert (foreign / "train/000001.png").read_bytes() == b"mine"


def test_without_debian_the_text_comes_from_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LICENCES_FOLDER", tmp_path / "absent")
    summary = build(tmp_path / "data", 3, 60, 40)
    assert "licence files of installed packages" in summary.text_source
    assert "absent is missing" in str(summary)
    files = {row["facts"]["file"] for row in of_kind(read(summary, "train"), "text_line")}
    assert files
    assert all(name.split(":")[0] in sources.FALLBACK_DISTRIBUTIONS for name in files)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("sklearn", "scikit-learn"),
        ("skimage", "scikit-image"),
        ("matplotlib", "matplotlib"),
    ],
)
def test_a_missing_package_is_named(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_find, real_import = sources.find_spec, sources.importlib.import_module

    def find(name: str) -> Any:
        return None if name == module else real_find(name)

    def load(name: str) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real_import(name)

    monkeypatch.setattr(sources, "find_spec", find)
    monkeypatch.setattr(sources.importlib, "import_module", load)
    with pytest.raises(UserError, match=rf"^{package} is not installed.*megatron-vlm\[demo\]"):
        build(tmp_path / "data", 3, 12, 10)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((-1, 5, 5), "seed"), ((1, 0, 5), "train_samples"), ((1, 5, 0), "heldout_samples")],
)
def test_impossible_counts_are_refused(
    arguments: tuple[int, int, int], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"demo {named}: .* given, expected"):
        build(tmp_path / "data", *arguments)
    assert not (tmp_path / "data").exists()
