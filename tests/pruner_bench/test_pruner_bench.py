"""The bench of methods: the search for a latency, rows that resume, the table, and claims that can fail."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch

from exporter.artifact import digest_of
from exporter.errors import ArtifactError, RecipeError
from exporter.networks.components import denoiser
from exporter.networks.fingerprint import structure_of
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.pruner_bench import compare_pruners
from exporter.pruner_bench.claims import ORDERS, claims
from exporter.pruner_bench.contestants import CONTESTANTS, chosen
from exporter.pruner_bench.fitting import TOLERANCE, first_below, search
from exporter.pruner_bench.page import write_pages
from exporter.pruner_bench.plot import latency_against_fidelity
from exporter.pruner_bench.rows import Row, Value, find, keep_row, read_rows
from exporter.pruner_bench.running import paired_change, predictions_of
from exporter.pruner_bench.table import markdown, overview, spread
from exporter.pruners import PRUNERS, pruner
from exporter.pruners.base import Context
from exporter.validation import options_from


def row(name, kind="channels", **changes):
    values = {
        "latency_ratio": Value(value=0.5, low=0.49, high=0.51),
        "psnr_mean_db": Value(value=30.0),
        "psnr_worst_db": Value(value=25.0),
        "judge_rate": Value(value=0.9, low=0.88, high=0.92),
        "judge_change": Value(value=-2.0, low=-2.9, high=-1.1),
    }
    plain = {"target": 0.5, "recovery": 0, "seed": 0, "status": "ok", "informed": True, "key": "k"}
    return Row(name=name, kind=kind, values=changes.pop("values", values), **{**plain, **changes})


@pytest.mark.parametrize("target", [0.75, 0.5, 0.3])
def test_the_search_ends_near_the_latency_that_is_asked_for(target):
    """Latency of a network whose keep ratio moves in steps, with a part that stays."""
    found = search(lambda value: 0.2 + 0.8 * math.floor(value * 64) / 64, target, 0.05)
    assert found.value is not None
    assert target - TOLERANCE <= found.ratio <= target + TOLERANCE / 3


def test_steps_that_jump_over_the_latency_give_the_nearest_below():
    found = search(lambda value: 0.9 if value > 0.5 else 0.6, 0.75, 0.1)
    assert found.ratio == 0.6
    assert "nearest" in found.note


def test_what_cannot_be_reached_says_the_least():
    found = search(lambda value: 0.82 + 0.18 * value**4, 0.5, 0.1)
    assert found.value is None
    assert found.note == "not reachable: 0.82x"
    assert len(found.tried) <= 9


def test_a_ratio_that_removes_nothing_counts_as_dense():
    def ratio(value):
        if value > 0.4:
            raise RecipeError("removes nothing")
        return 0.5

    assert search(ratio, 0.5, 0.1).ratio == 0.5


def test_every_contestant_is_a_recipe_of_its_method():
    for contestant in CONTESTANTS:
        if contestant.method == "fewer-steps":
            continue
        values = (None,) if contestant.knob is None else (contestant.knob.values or (0.5,))
        for value in values:
            given = dict(contestant.stage(value)["prune"])
            method = pruner(given.pop("method"))
            assert options_from(method.options, given, "prune") is not None
    assert {contestant.method for contestant in CONTESTANTS} == {*PRUNERS, "fewer-steps"}
    assert len({contestant.name for contestant in CONTESTANTS}) == len(CONTESTANTS)


def test_a_kind_with_informed_lines_has_a_random_one():
    for kind in ("channels", "blocks", "zeros"):
        assert any(c.kind == kind and c.name.startswith("random") and not c.informed for c in CONTESTANTS)


def test_rows_are_found_again_by_what_they_depend_on(tmp_path):
    one = row("taylor", target=None)
    keep_row(one, tmp_path)
    assert read_rows(tmp_path) == [one]
    assert find(read_rows(tmp_path), one.model_copy(update={"values": {}})) == one
    assert find(read_rows(tmp_path), one.model_copy(update={"key": "other"})) is None
    next((tmp_path / "rows").iterdir()).write_text("{")
    with pytest.raises(ArtifactError, match=r"no row of a bench.*Delete it"):
        read_rows(tmp_path)


def test_the_paired_change_is_that_of_the_counts():
    """100 of 1,000 lost, 60 won: McNemar's standard error of the difference, by hand."""
    found = paired_change({"of": 1000, "lost_to_dense": 100, "won_over_dense": 60})
    assert found.value == pytest.approx(-4.0)
    spread_points = 100 * 1.96 * math.sqrt(160 - 40**2 / 1000) / 1000
    assert (found.low, found.high) == (pytest.approx(-4 - spread_points), pytest.approx(-4 + spread_points))


def test_seeds_are_shown_as_mean_and_range():
    assert spread([1.0, 2.0, 3.0], ".1f") == "2.0 (1.0 to 3.0)"
    assert spread([2.0, 2.0], ".1f") == "2.0"
    assert spread([], ".1f") == "-"


def test_the_table_has_a_line_for_what_was_not_reached_and_what_failed():
    rows = [
        row("random", seed=seed, values={"latency_ratio": Value(value=0.5), "psnr_mean_db": Value(value=20.0 + seed)})
        for seed in range(3)
    ]
    rows += [row("ecodiff", status="not reachable", note="not reachable: 0.82x", values={})]
    rows += [row("wanda", status="failed", note="a | bar\nand a line", values={})]
    text = markdown(rows)
    assert "at 0.5x of dense's loop, before recovery" in text
    assert "| random | 0.50 | - | 21.0 (20.0 to 22.0) / - |" in text
    assert "| ecodiff | not reachable: 0.82x |" in text
    assert "| wanda | failed: a / bar and a line |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_rows_of_more_prompts_do_not_stand_beside_dense_of_fewer(tmp_path):
    rows = [row("dense", kind="dense", target=None), *(row("laptop-diff", recovery=steps) for steps in (0, 300, 5000))]
    lines = [line.split("|")[1].strip() for line in markdown(rows).splitlines() if line.startswith("| ")]
    assert [line for line in lines if line != "method" and "-" * 3 not in line] == [
        *("dense", "laptop-diff") * 2,
        "laptop-diff",
    ]
    write_pages(rows, "how it was taken", tmp_path)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"before", "recovered-300"}


def test_claims_follow_from_the_rows_and_can_fail():
    good = [row("random", informed=False, values={"psnr_mean_db": Value(value=20.0)}), row("taylor")]
    assert [claim.holds for claim in claims(good)] == [None, True]
    bad = [row("random", informed=False, values={"psnr_mean_db": Value(value=31.0)}), row("taylor")]
    found = claims([*bad, row("taylor", recovery=300)])
    assert [claim.holds for claim in found] == [True, False]
    assert "not beaten by taylor" in found[1].told
    assert found[1].text.startswith("every informed method measured that removes channels")
    assert "Not measured: magnitude, diff-pruning" in found[1].told
    unreached = [row(name, status="not reachable", values={}) for name in (one.name for one in CONTESTANTS)]
    whole = claims([*(one for one in unreached if one.name not in ("random", "taylor")), *good])
    assert whole[-1].line().startswith("every informed method that removes channels beats random at 0.5x")
    assert "Not measured" not in whole[-1].told
    values = {"judge_rate": Value(value=0.9), "judge_change": Value(value=-2.5, low=-3.4, high=-1.6)}
    assert claims([row("taylor", recovery=300, values=values)])[0].holds is False


def test_pages_show_every_row_and_nothing_from_outside(tmp_path):
    rows = [row("dense", kind="dense", target=None), row("taylor"), row("<script>", kind="blocks")]
    write_pages(rows, "how it was taken", tmp_path)
    page = (tmp_path / "bench.html").read_text()
    assert "how it was taken" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page.replace("&lt;script", "")
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert [Row.model_validate(one) for one in kept["rows"]] == rows
    assert "before recovery" in (tmp_path / "bench.md").read_text()


def test_names_in_the_drawing_do_not_cover_one_another():
    def at(name, ratio, rate):
        return row(name, values={"latency_ratio": Value(value=ratio), "judge_rate": Value(value=rate)})

    names = [f"method {number}" for number in range(14)]
    crowd = [at(name, 0.5 + 0.004 * number, 0.97) for number, name in enumerate(names)]
    svg = latency_against_fidelity([*crowd, at("far", 0.9, 0.1), at("beside", 0.63, 0.97)], "title")
    places = {
        name: (float(x), float(y))
        for x, y, name in re.findall(r'<text[^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    }
    assert set(places) >= {*names, "far", "beside"}
    shown = [(*places[name], name) for name in [*names, "far", "beside"]]
    for index, (x, y, name) in enumerate(shown):
        for other_x, other_y, other in shown[index + 1 :]:
            width = 4.5 * len(name if x < other_x else other)
            assert abs(y - other_y) > 8 or abs(x - other_x) > width, (name, other)


@pytest.mark.parametrize("text", ["", "half", "1.5", "0.5,0"])
def test_latencies_that_are_none_are_refused(text, tmp_path):
    with pytest.raises(RecipeError, match=r"--latencies: got .* Write --latencies 0\.75,0\.5"):
        compare_pruners(tmp_path, names=None, latencies=text, images=(16, 16), seeds=1, recovery=(0, 0), progress=None)


def test_unknown_contestants_are_refused_with_the_nearest():
    assert [contestant.name for contestant in chosen(("taylor", "random"))] == ["random", "taylor"]
    with pytest.raises(RecipeError, match=r"bench pruners: got 'tailor', expected .*Did you mean 'taylor'"):
        chosen(("tailor",))


@pytest.mark.parametrize(("target", "value"), [(0.75, 3.0), (0.5, 5.0), (0.3, None)])
def test_of_values_in_turn_the_first_that_is_fast_enough_is_found(target, value):
    ratios = {2.0: 0.9, 3.0: 0.74, 4.0: 0.6, 5.0: 0.5, 7.0: 0.4}
    asked = []

    def ratio(tried):
        asked.append(tried)
        return ratios[tried]

    found = first_below(ratio, tuple(ratios), target)
    assert found.value == value
    assert len(asked) <= 3
    assert (found.note == "not reachable: 0.40x") == (value is None)


def test_a_local_ranking_has_the_widths_of_random_at_every_ratio(tiny_loan, tmp_path):
    same = [contestant for contestant in CONTESTANTS if contestant.widths_of]
    assert {contestant.name for contestant in same} >= {"magnitude", "taylor", "diff-pruning"}
    assert "diff-pruning global" not in {contestant.name for contestant in same}
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    part = denoiser("StableDiffusionPipeline")
    dense = load_network(tiny_loan.dense.path / part.folder, cls=part.cls)
    found = set()
    for name in ("random", "magnitude"):
        given = dict(by_name[name].stage(0.6)["prune"])
        method, network = pruner(given.pop("method")), copy.deepcopy(dense)
        context = Context(torch.Generator().manual_seed(0), Silent(), tmp_path, tiny_loan)
        method(method.options(**given)).prune(network, context)
        found.add(digest_of(structure_of(network)))
    assert len(found) == 1


def test_the_overview_has_a_line_per_method_and_a_column_per_latency():
    values = row("taylor").values
    rows = [
        row("dense", kind="dense", target=None),
        row("taylor", values={**values, "judge_rate": Value(value=0.1)}),
        row("taylor", seed=1, values={"psnr_mean_db": Value(value=32.0), "psnr_worst_db": Value(value=26.0)}),
        row("taylor", recovery=300),
        row("taylor", target=0.25, status="not reachable", values={}, note="not reachable: 0.31x"),
        row("random", target=0.25),
        row("bk-sdm tiny", kind="blocks", target=None),
    ]
    assert overview(rows).splitlines() == [
        "| method | at 0.5x | at 0.25x | of one size |",
        "| --- | --- | --- | --- |",
        "| taylor | 0.50x, 31.0 / 25.5 dB, 10.0 to 90.0 % | not reachable: 0.31x |  |",
        "| random | not measured | 0.50x, 30.0 / 25.0 dB, 90.0 % |  |",
        "| bk-sdm tiny |  |  | 0.50x, 30.0 / 25.0 dB, 90.0 % |",
    ]


def test_what_a_method_predicts_of_itself_is_held_to_what_it_measured():
    facts = {
        "additivity": {
            "spearman": 0.97,
            "by_size": {"2": {"sets": 9, "spearman": 0.6}, "3": {"sets": 2, "spearman": 0}},
        },
        "latency": {"largest_error": 0.12, "error_without_units": 0.5},
    }
    predictions = predictions_of(facts)
    assert predictions == {
        "spearman": 0.97,
        "spearman_of_one_size": 0.6,
        "latency_error": 0.12,
        "latency_error_without_units": 0.5,
    }
    assert predictions_of({"additivity": None}) == {}
    told = {claim.text: claim for claim in claims([row("snapfusion", kind="blocks", predictions=predictions)])}
    sums = told["the sums that snapfusion adds up rank what is measured, Spearman >= 0.8"]
    assert sums.holds
    assert (
        sums.told == "Spearman 0.97 over sets of all sizes, 0.60 over sets of one size, where only the choice counts."
    )
    table = told["the latency table of snapfusion predicts whole networks within 10%"]
    assert table.holds is False
    assert table.told == ("The largest error is 12.0%, at this size, and 50.0% of the network that has no unit left.")


@pytest.mark.parametrize(("change", "holds"), [(-2.0, False), (-0.5, None), (0.5, True)])
def test_pruning_is_held_to_fewer_steps_of_the_plain_sampler(change, holds):
    plain = row("fewer-steps", kind="steps", informed=False, values={"judge_change": Value(value=-1.0)})
    values = {**row("taylor").values, "judge_change": Value(value=change, low=change - 0.9, high=change + 0.9)}
    rows = [plain, row("taylor", values=values, recovery=300)]
    (claim,) = (found for found in claims(rows) if "fewer steps" in found.text)
    assert claim.holds is holds
    assert claim.told == (
        f"-1.0 points to dense (-1.0 to -1.0), against {change:+.1f} ({change - 0.9:+.1f} to {change + 0.9:+.1f}) of "
        "taylor after 300 steps."
    )


@pytest.mark.parametrize(
    ("errors", "changes", "verdict"),
    [
        ((31.0, 30.0), (-1.0, -3.0), "holds"),
        ((31.0, 30.0), (-2.5, -2.0), "holds"),
        ((30.1, 30.0), (-1.0, -3.0), "holds"),
        ((29.0, 30.0), (-3.0, -1.0), "does not hold"),
        ((29.0, 30.0), (-2.0, -2.5), "does not hold"),
        ((31.0, 30.0), (-3.0, -1.0), "undecided"),
        ((30.1, 30.0), (-2.0, -2.5), "undecided"),
    ],
)
def test_the_orders_of_the_papers_are_held_to_both_measures(errors, changes, verdict):
    rows = []
    for name, error, change in zip(("obs-diff 2:4", "sparsegpt 2:4"), errors, changes, strict=True):
        values = {
            "psnr_mean_db": Value(value=error),
            "psnr_worst_db": Value(value=20.0),
            "judge_change": Value(value=change, low=change - 0.5, high=change + 0.5),
        }
        rows.append(row(name, target=None, kind="zeros", values=values))
    (claim,) = (found for found in claims(rows) if found.text.startswith("OBS-Diff"))
    assert claim.text == "OBS-Diff: obs-diff 2:4 beats sparsegpt 2:4, of one size, before recovery"
    assert claim.verdict == verdict
    assert claim.told == (
        f"{errors[0]:.1f} / 20.0 dB and {changes[0]:+.1f} points against {errors[1]:.1f} / 20.0 dB and "
        f"{changes[1]:+.1f} points."
    )


def test_a_method_that_trains_is_compared_with_a_rival_that_was_trained_as_long():
    values = {**row("a").values, "psnr_mean_db": Value(value=33.0)}
    own = row("sparsedm 2:4", target=None, kind="zeros", values=values, stage={"prune": {"steps": 300}})
    rows = [
        own,
        row("magnitude 2:4", target=None, kind="zeros"),
        row(
            "magnitude 2:4",
            target=None,
            kind="zeros",
            recovery=300,
            values={**values, "psnr_mean_db": Value(value=34.0)},
        ),
    ]
    (claim,) = (found for found in claims(rows) if found.text.startswith("SparseDM"))
    assert claim.text == "SparseDM: sparsedm 2:4 beats magnitude 2:4, of one size, after 300 steps of its own"
    assert claim.told.startswith("33.0 / 25.0 dB")
    assert claim.holds is False
    longer = own.model_copy(update={"stage": {"prune": {"steps": 600}}})
    assert not [found for found in claims([longer, *rows[1:]]) if found.text.startswith("SparseDM")]


def test_the_orders_name_lines_of_the_table():
    names = {contestant.name for contestant in CONTESTANTS}
    assert {name for order in ORDERS for name in (order.better, order.worse)} <= names


def test_a_method_counts_by_its_worst_seed():
    def recovered(name, seed, change):
        values = {**row(name).values, "judge_change": Value(value=change, low=change - 1)}
        return row(name, seed=seed, recovery=5000, values=values)

    rows = [recovered("taylor", 0, -1.0), recovered("taylor", 1, -3.5), recovered("magnitude", 0, -2.5)]
    (claim,) = (found for found in claims(rows) if "loses at most" in found.text)
    assert claim.told.startswith("magnitude after 5,000 steps: -2.5 points")
