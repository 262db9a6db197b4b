"""The accuracy benchmark: its table, and one tiny run over the built-in model."""

from accuracy import TaskResult, measure, table
from jax_engine import LLM
from jax_engine.models.demo.generator import held_out_samples, task_named


def test_the_table_ends_with_the_mean_over_tasks() -> None:
    results = [TaskResult("addition", 9, 10, ("1+1", "3")), TaskResult("facts", 1, 2, None)]
    assert table(results).splitlines()[-2:] == [
        "| facts | 1 | 2 | 50.0% |",
        "| **mean of tasks** | 10 | 12 | **70.0%** |",
    ]


def test_the_built_in_model_can_add_and_call_tools() -> None:
    samples = [
        sample for name in ("addition", "tool calls") for sample in held_out_samples(task_named(name), seed=0, count=8)
    ]
    with LLM(max_model_len=512) as llm:
        results = measure(llm, samples, max_tokens=128)
    assert [result.task for result in results] == ["addition", "tool calls"]
    assert all(result.accuracy > 70 for result in results)
