"""The emoji as data: which are used, which pairs are held back, their captions, how they are drawn, and how they are fetched."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.emoji_sets import CONCEPTS, write_sets
from tuning.emoji import fetch as fetch_module
from tuning.emoji.concepts import BACKGROUNDS, SETS, STYLES, Drawing, Icon, caption, held_back, load_icons, split
from tuning.emoji.fetch import fetch, main, write_pictures
from tuning.emoji.pictures import SIZE, draw, random_drawing, render
from tuning.errors import TuningError

pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def icons_of(count: int, styles: tuple[str, ...] = STYLES) -> list[Icon]:
    return [Icon(f"thing {i}", style, "<svg/>") for i in range(count) for style in styles]


def test_what_is_hard_to_draw_or_hidden_is_left_out(sets: Path) -> None:
    icons = load_icons(sets)
    assert {icon.concept for icon in icons} == {name.replace("-", " ") for name in CONCEPTS}
    assert len(icons) == len(CONCEPTS) * len(STYLES)
    assert len({icon.key for icon in icons}) == len(icons)


def test_a_missing_or_damaged_set_is_named(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"noto.json.gz is missing; fetch the emoji first: python -m tuning.emoji.fetch"):
        load_icons(tmp_path)
    damaged = write_sets(tmp_path / "damaged")
    (damaged / "fluent.json.gz").write_bytes(b"no gzip")
    with pytest.raises(TuningError, match=r"fluent.json.gz cannot be read .* delete it"):
        load_icons(damaged)


def test_one_style_each_of_150_concepts_is_held_back() -> None:
    icons = icons_of(300)
    train, held = split(icons)
    assert len(held) == 150 == len({icon.concept for icon in held})
    assert len(train) + len(held) == len(icons)
    assert {icon.concept for icon in train} == {icon.concept for icon in icons}
    assert {icon.style for icon in held} == set(STYLES)


def test_the_held_back_pairs_do_not_depend_on_the_order_and_are_these() -> None:
    icons = icons_of(300)
    shuffled = random.Random(0).sample(icons, len(icons))
    assert held_back(icons) == held_back(shuffled)
    assert sorted(held_back(icons_of(4))) == sorted(held_back(icons_of(4)))
    first = sorted(held_back(icons_of(2)))
    assert first == EXPECTED, "another split makes every model trained so far worthless to measure"


EXPECTED = ["emojione/thing 0", "fluent/thing 1"]


def test_concepts_of_three_styles_lose_none() -> None:
    assert held_back(icons_of(20, STYLES[:3])) == set()


def test_captions_say_what_is_drawn() -> None:
    rng = random.Random(0)
    drawing = Drawing("red apple", "noto", "blue", "small", "left")
    texts = {caption(drawing, rng) for _ in range(200)}
    assert all("small red apple on the left on a blue background" in text for text in texts)
    assert any("noto" not in text for text in texts)
    assert {"small red apple on the left on a blue background, noto style"} < texts
    plain = {caption(Drawing("red apple", "noto"), rng) for _ in range(200)}
    assert any("white background" in text for text in plain)
    assert any("background" not in text for text in plain)


def box(picture: torch.Tensor, colour: tuple[float, float, float]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what has a colour."""
    near = (picture - torch.tensor(colour)[:, None, None]).abs().amax(0) < 0.1
    rows, columns = near.any(1).nonzero().flatten(), near.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def test_size_place_and_background_are_those_asked_for(sets: Path) -> None:
    icons = [icon for icon in load_icons(sets) if icon.concept == "red apple"]
    textures = render(icons)
    assert textures.shape == (len(STYLES), 4, SIZE, SIZE)
    assert textures.dtype == torch.uint8
    red = (1.0, -1.0, -1.0)

    def one(size: str, place: str) -> torch.Tensor:
        return draw(textures[:1], [Drawing("red apple", "noto", "blue", size, place)])[0]

    plain, small, left, bottom = one("", ""), one("small", ""), one("small", "left"), one("small", "bottom")
    corner = [v / 127.5 - 1 for v in BACKGROUNDS["blue"]]
    assert torch.allclose(plain[:, 0, 0], torch.tensor(corner), atol=1e-5)  # float32
    assert box(plain, red) == (6, 6, 121, 121)  # 0.92 of 128, centred: from 5.1 to 122.9, so these are covered whole
    assert box(small, red) == (32, 32, 95, 95)
    shift = round(0.24 * SIZE)
    assert box(left, red)[0] == pytest.approx(32 - shift, abs=1)
    assert box(left, red)[1] == 32
    assert box(bottom, red)[3] == pytest.approx(95 + shift, abs=1)


def test_random_drawings_repeat_and_only_small_ones_move() -> None:
    icon = Icon("red apple", "noto", "<svg/>")
    drawings = [random_drawing(icon, random.Random(i)) for i in range(300)]
    assert drawings == [random_drawing(icon, random.Random(i)) for i in range(300)]
    assert {d.size for d in drawings if d.place} == {"small"}
    assert {d.background for d in drawings} == set(BACKGROUNDS)


def test_pictures_are_written_with_captions_and_kept(sets: Path, tmp_path: Path) -> None:
    icons = load_icons(sets)[:4]
    write_pictures(tmp_path, icons, 2)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(np.asarray(Image.open(tmp_path / line["file_name"])).shape == (SIZE, SIZE, 3) for line in lines)
    assert all(icons[i // 2].concept in line["text"] for i, line in enumerate(lines))
    first, second = (tmp_path / line["file_name"] for line in lines[:2])
    kept, before = second.read_bytes(), first.read_bytes()
    first.unlink()
    second.write_bytes(b"kept")
    write_pictures(tmp_path, icons, 2)
    assert (first.read_bytes(), second.read_bytes()) == (before, b"kept")
    assert kept != b"kept"


def archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in ("icons", "metadata"):
            data = json.dumps({"icons": {}, "of": path.name}).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_package_that_is_not_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch_module, "_pack", lambda one, folder: archive(folder / "other.tgz"))
    with pytest.raises(TuningError, match=r"@iconify-json/noto 1.2.9 has the SHA-256 \w{64}, not 3e918d88.*nothing of it"):
        fetch(tmp_path / "icons")
    assert list((tmp_path / "icons").iterdir()) == []


def test_sets_that_are_there_are_not_fetched_again(monkeypatch: pytest.MonkeyPatch, sets: Path) -> None:
    monkeypatch.setattr(fetch_module, "_pack", lambda one, folder: pytest.fail("fetched"))
    said: list[str] = []
    fetch(sets, said.append)
    assert said == [f"{style}: there already" for style in SETS]


def test_npm_that_is_missing_or_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TuningError, match="npm is missing.*install Node.js"):
        fetch(tmp_path / "icons")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'network down' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(TuningError, match=r"npm pack @iconify-json/noto@1.2.9 failed: network down"):
        fetch(tmp_path / "icons")


def test_the_command_makes_all_three_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sets(tmp_path / "icons")
    main(["--out", str(tmp_path), "--versions", "1", "--processes", "1"])
    train, held = split(load_icons(tmp_path / "icons"))
    for folder, icons in (("pictures", train), ("held_back", held)):
        lines = (tmp_path / folder / "metadata.jsonl").read_text().splitlines()
        assert len(lines) == len(icons) > 0
    assert f"{len(train)} pairs of 5 concepts and 5 styles to train on, 5 pairs held back" in capsys.readouterr().out
    with pytest.raises(TuningError, match="--versions 0 is too few"):
        main(["--versions", "0"])


def test_the_notice_names_every_set() -> None:
    text = (Path(__file__).resolve().parents[3] / "NOTICE").read_text()
    for style, one in SETS.items():
        assert f'style "{style}"' in text
        assert one.authors in text
    assert "OpenMoji" in text
