"""The table of ranks: its shares are of one process, or they are not there."""

import ranks


def found(peak):
    peaks = {phase: [peak, 2 * peak] for phase in ranks.PHASES}
    return {"peaks": peaks, "tok_s": 20.0, "cpu_s": 1.5}


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_row_is_a_share_of_one_process():
    assert cells(ranks.line(1, found(800e6), found(800e6)))[6:] == ["800", "1600", "1.00", "–", "20", "1.50"]
    assert cells(ranks.line(2, found(400e6), found(800e6)))[6:] == ["400", "800", "0.50", "0.65", "20", "1.50"]


def test_the_first_of_several_ranks_is_no_share_of_itself(monkeypatch, capsys):
    """Asked for 4 and 2 there is nothing to divide by; asked for 2 and 1, one process is measured first."""
    monkeypatch.setattr(ranks, "measure", lambda size, steps, transfer, num_ranks: found(800e6 / num_ranks))
    monkeypatch.setattr(ranks.saving, "model_dir", lambda size: None)
    monkeypatch.setattr(ranks.saving, "rows_file", lambda: None)
    shares = {}
    for asked in (["4", "2"], ["2", "1"]):
        monkeypatch.setattr("sys.argv", ["ranks.py", "--ranks", *asked])
        ranks.main()
        lines = capsys.readouterr().out.splitlines()
        column = cells(lines[0]).index("of one process")
        shares[asked[0]] = [(cells(line)[0], cells(line)[column]) for line in lines[2:]]
    assert shares == {"4": [("2", "–"), ("4", "–")], "2": [("1", "1.00"), ("2", "0.50")]}
