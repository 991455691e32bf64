"""Campaign files: what they ask for, and what is told when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.errors import InputError
from probes.grid import read_campaign
from probes.order import arrange, in_order, load_key, split

CAMPAIGNS = sorted((Path(__file__).parents[2] / "results" / "campaigns").glob("*.toml"))


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "g.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_grid_is_the_product_of_its_lists(tmp_path: Path) -> None:
    text = 'model="m"\n[grid]\nmicro_batch_size=[1,2,3]\n"lora.rank"=[8,16]\n'
    campaign = read_campaign(write(tmp_path, text), {})
    shapes = {(p.spec.micro_batch_size, p.spec.lora.rank) for p in campaign.points}
    assert shapes == {(b, r) for b in (1, 2, 3) for r in (8, 16)}
    assert campaign.name == "g"


def test_nested_fields_merge_over_the_common_ones(tmp_path: Path) -> None:
    text = (
        'model="m"\nlora={rank=4, dropout=0.0}\n[[grids]]\npoints=[{"lora.rank"=64}, {bisect=true}]'
    )
    first, second = read_campaign(write(tmp_path, text), {}).points
    assert (first.spec.lora.rank, first.spec.lora.dropout) == (64, 0.0)
    assert (second.spec.lora.rank, second.options.bisect) == (4, True)


def test_equal_points_are_measured_once(tmp_path: Path) -> None:
    text = 'model="m"\n[[grids]]\n[[grids]]\nmicro_batch_size=1\n'
    assert len(read_campaign(write(tmp_path, text), {}).points) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('model="m"\n[grid]\nmicro_batch_size=4\n', "grid"),
        ('model="m"\n[grid]\nmicro_batch=[4]\n', "micro_batch"),
        ('model="m"\n[grid]\n"lora.rnk"=[4]\n', "rank"),
        ('model="m"\n[options]\nstep=4\n', "steps"),
        ('model="m"\nsteps=2\nwarmup_steps=2\n', "warmup_steps"),
        ('model="m"\norder="random"\n', "teach"),
        ('model="m"\n[grid]\nmicro_batch_size=[]\n', "no probe"),
        ("", "empty"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        read_campaign(write(tmp_path, text), {})
    assert told in str(error.value)


def test_shipped_campaigns_span_what_the_planner_plans() -> None:
    points = [p for path in CAMPAIGNS for p in read_campaign(str(path), {}).points]
    assert len(points) >= 150
    assert sum(p.options.bisect for p in points) >= 60
    specs = [p.spec for p in points]
    assert {s.quantization for s in specs} == {"none", "nf4", "fp4", "int8"}
    assert {s.stack for s in specs} == {"stock", "lean"}
    assert {s.precision for s in specs} == {"bf16", "fp16", "fp32"}
    assert {s.attention for s in specs} >= {"sdpa", "eager"}
    assert {s.images_per_sample for s in specs} >= {0, 1, 2, 4}
    assert max(s.sequence_length for s in specs) >= 8192
    assert {s.lora.rank for s in specs} >= {4, 8, 16, 64}
    assert any(s.lora.target_modules == ("lm_head",) for s in specs)
    assert any(s.evaluation_batch_size for s in specs)
    assert any(s.method == "full" for s in specs)
    assert any(s.optimizer.startswith("paged") for s in specs)


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda path: path.stem)
def test_arranging_keeps_every_point_and_groups_by_load(path: Path) -> None:
    points = read_campaign(str(path), {}).points
    groups = arrange(points)
    arranged = [p.key for group in groups for p in group.points]
    assert sorted(arranged) == sorted(p.key for p in points)
    for group in groups:
        keys = {load_key(p.spec, p.options.weights, p.options.repeat) for p in group.points}
        assert keys == {group.load}


def test_novel_points_come_first(tmp_path: Path) -> None:
    """The one point that differs in many fields precedes near copies of what is known."""
    text = 'model="m"\n[[grids]]\npoints=[{sequence_length=513},{sequence_length=514},'
    text += '{sequence_length=4096,micro_batch_size=8,gradient_checkpointing=true,optimizer="sgd"}]'
    points = read_campaign(write(tmp_path, text), {}).points
    known = read_campaign(write(tmp_path, 'model="m"\n'), {}).points
    (group,) = arrange(points, known)
    assert group.points[0].spec.optimizer == "sgd"


def test_a_bisected_probe_comes_first_in_its_process(tmp_path: Path) -> None:
    flags = ("false", "true", "false", "true", "true")
    points = ", ".join(
        f"{{micro_batch_size={i + 1}, bisect={flag}}}" for i, flag in enumerate(flags)
    )
    campaign = read_campaign(write(tmp_path, f'model="m"\n[[grids]]\npoints=[{points}]'), {})
    groups = split(in_order(campaign.points), 20, fresh_capacity=True)
    asked = [[p.options.bisect for p in g.points] for g in groups]
    assert asked == [[False], [True, False], [True], [True]]
    assert [p.key for g in groups for p in g.points] == [p.key for p in campaign.points]
    assert [len(g.points) for g in split(in_order(campaign.points), 2)] == [2, 2, 1]
