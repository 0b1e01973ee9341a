"""What card and Hub are told of scores: a verdict in sentences, a table, the Hub's own file. Not here: measuring."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import eval_result_entries_to_yaml, parse_eval_result_entries
from loopback.cards import problems

from merger.card.facts import eval_results, score_facts
from merger.card.metadata import front_matter
from merger.evaluation.budget import Score

HARNESS = "500 examples, 0 shots, version 1.0, lm-evaluation-harness 0.4.9"


def text(model: str | None, value: float, metric: str = "bits per byte") -> Score:
    """Of a text, lower is better."""
    return Score(model, "held.txt", metric, value, None, False, "100 characters", "held.txt")


def task(model: str | None, value: float, name: str = "arc_easy", metric: str = "acc_norm") -> Score:
    """Of a data set of the Hub, higher is better."""
    return Score(model, name, metric, value, 0.01, True, HARNESS, "allenai/ai2_arc")


VERDICTS = {
    "better": (
        [text(None, 1.2), text("a", 1.3), text("b", 1.4)],
        ["Better than its best parent by 0.1 on held.txt: bits per byte 1.2, of a 1.3 (lower is better)."],
    ),
    "worse": (
        [text(None, 1.35), text("a", 1.3)],
        ["Worse than its best parent by 0.05 on held.txt: bits per byte 1.35, of a 1.3 (lower is better)."],
    ),
    "the same": (
        [text(None, 1.3), text("a", 1.3)],
        ["As good as its best parent on held.txt: bits per byte 1.3, of a 1.3 (lower is better)."],
    ),
    "within the errors": (
        [task(None, 0.52), task("a", 0.5)],
        ["As good as its best parent on arc_easy: acc_norm 0.520 ± 0.010, of a 0.500 ± 0.010 (higher is better)."],
    ),
    "beyond them": (
        [task(None, 0.55), task("a", 0.5), task("b", 0.6)],
        ["Worse than its best parent by 0.05 on arc_easy: "
         "acc_norm 0.550 ± 0.010, of b 0.600 ± 0.010 (higher is better)."],
    ),
    "alone": (
        [text(None, 1.2)],
        ["Measured on held.txt: bits per byte 1.2 (lower is better); its parents were not."],
    ),
    "the last metric of each": (
        [text(None, 9.0, "perplexity"), text(None, 1.2), task(None, 0.5, metric="acc"), task(None, 0.55)],
        ["Measured on held.txt: bits per byte 1.2 (lower is better); its parents were not.",
         "Measured on arc_easy: acc_norm 0.550 ± 0.010 (higher is better); its parents were not."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_says_by_how_much_and_on_what(name: str) -> None:
    """Beside the best of the parents; a difference within twice its error is none."""
    scores, said = VERDICTS[name]
    assert score_facts(scores, "org/x")["evaluation"]["verdict"] == said


def test_a_card_names_results_of_the_merge_alone() -> None:
    """Without any there is no model-index, which the Hub would refuse to be empty."""
    assert score_facts([text("a", 1.3)], "org/x")["metadata"] == {"model-index": []}
    index = score_facts([text(None, 1.2), text("a", 1.3)], "org/x")["metadata"]["model-index"]
    assert [result["dataset"]["name"] for result in index[0]["results"]] == ["held.txt"]
    assert problems(front_matter({"model-index": index})) == ([], [])


def test_the_hub_reads_scores_on_its_own_data_sets() -> None:
    """In the form of the client's own class: one number a task, with where it was told and how it was measured."""
    scores = [text(None, 1.2), task(None, 0.5, metric="acc"), task(None, 0.55), task("a", 0.6)]
    made = yaml.safe_load(eval_results(scores, "org/x") or "")
    (entry,) = parse_eval_result_entries(made)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "arc_easy", 0.55)
    assert entry.source_url == "https://huggingface.co/org/x/blob/main/merger.evaluation.json"
    assert entry.notes == f"acc_norm; {HARNESS}"
    assert eval_result_entries_to_yaml([entry]) == made
    assert "source" not in yaml.safe_load(eval_results(scores, None) or "")[0]
    assert eval_results([text(None, 1.2)], "org/x") is None
