"""Times of families: every budget of every network is in the table, beside its ratios to the full network."""

import json

import pytest
from family_times import ARCHITECTURES, create_network, main, table_of

from hf_visual_perceiver.benchmark import benchmark
from hf_visual_perceiver.benchmark.benchmark import BenchmarkRow
from hf_visual_perceiver.modeling import FAMILIES, Budget


def test_every_family_has_a_network():
    families = [family for family in FAMILIES.values() if family.architectures.keys() & set(ARCHITECTURES)]
    assert len(families) == len(FAMILIES)
    with pytest.raises(ValueError, match=r"architecture among .*, got 'resnet18'"):
        create_network("resnet18")


def test_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *others: 1.0)  # takes long, and is not in the table
    names, path = ["lookupvit_nano_patch4_32", "qna_vit_nano_32"], tmp_path / "times.json"
    main(names, batch_size=[1, 2], repetitions=1, single_calls=2, json_file=path)
    header, _, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header == "| network | budget | MACs (M) | / full | batch 1, ms | / full | batch 2, ms | / full |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    config = create_network(names[0]).config
    settings = [budget.short(config.knobs) for budget in config.budgets()]
    assert [row[:2] for row in cells] == [*([names[0], setting] for setting in settings), [names[1], "full"]]
    share = config.count_macs(config.budgets()[0]) / config.count_macs(Budget())
    assert float(cells[0][3]) == pytest.approx(share, abs=5e-4)
    for row in cells:
        if row[1] == "full":
            assert row[3::2] == ["1.000"] * 3
    written = json.loads(path.read_text())
    assert {name: len(rows) for name, rows in written["rows"].items()} == {names[0]: 2 * len(settings), names[1]: 2}
    assert (written["conditions"]["form"], written["conditions"]["single_calls"]) == ("eager", 2)


def test_ratios_are_of_one_batch_size():
    rows = [
        BenchmarkRow(size, "eager", setting, 1, macs, ms, None, None, 1.0, ratio, None, 1.0, None, None, None)
        for setting, size, macs, ms, ratio in (
            ("K=1", 1, 1e6, 2.0, 0.5),
            ("full", 1, 4e6, 4.0, 1.0),
            ("K=1", 256, 1e6, 30.0, 0.3),
            ("full", 256, 4e6, 100.0, 1.0),
        )
    ]
    assert table_of({"n": rows}).splitlines()[2:] == [
        "| n | K=1 | 1.0 | 0.250 | 2 | 0.500 | 30 | 0.300 |",
        "| n | full | 4.0 | 1.000 | 4 | 1.000 | 100 | 1.000 |",
    ]
