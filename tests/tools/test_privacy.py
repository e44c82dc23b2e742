"""`fedrun privacy`: its tables against the accountant's numbers, and what it refuses."""

from __future__ import annotations

import math
import re
import sys

import pytest

from fedrun import cli
from fedrun.privacy.accountant import gaussian_epsilon, zcdp_epsilon
from fedrun.tools.privacy import shown, two_digits
from tests.support.runs import fresh_python

CLIENTS = ("--clients", "1000", "--participations", "12")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def asked(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert cli.main(["privacy", *flags]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    return printed


def row(printed: str, first: str) -> list[str]:
    """The cells of the row of a table that begins so."""
    (line,) = re.findall(rf"^ *{re.escape(first)}  +.*$", printed, re.MULTILINE)
    return re.split("  +", line.strip())


def refused(caplog: pytest.LogCaptureFixture, *flags: str) -> str:
    caplog.clear()
    assert cli.main(["privacy", *flags]) == 2
    (record,) = caplog.records
    assert "\n" not in record.message
    return record.message


def test_a_thousand_clients(capsys: pytest.CaptureFixture[str]) -> None:
    """Epsilon 8.0, what more noise or more rounds would be, and other neighbours."""
    printed = asked(capsys, *CLIENTS, "--noise", "2.08", "--delta", "1e-5")
    assert printed.startswith("epsilon 8.0 at delta 1e-05: ")
    assert ("by a factor of 2,971 at most, but for a chance of about 1e-05."
            in " ".join(printed.split()))
    mu = math.sqrt(12) / 2.08
    assert f"two texts of the client epsilon is {shown(gaussian_epsilon(2 * mu, 1e-5))}." \
        in " ".join(printed.split())
    assert f"it is {shown(zcdp_epsilon(mu * mu / 2, 1e-5))}." in " ".join(printed.split())
    assert row(printed, "2.08") == ["2.08", "5.3", "8.0", "12.3 no"]
    assert row(printed, "1.04")[1:] == ["12.3 no", "19.2 no", "30.5 no"]
    assert row(printed, "4.16")[3] == shown(gaussian_epsilon(math.sqrt(24) / 4.16, 1e-5))


def test_what_the_noise_leaves_to_learn(capsys: pytest.CaptureFixture[str]) -> None:
    """Z sqrt(D) / K in a round, and less by the root of the rounds in all."""
    printed = asked(capsys, *CLIENTS, "--noise", "2.08")
    one = 2.08 * math.sqrt(500_000) / 100
    assert row(printed, "100")[1:3] == [
        "120", f"{two_digits(one)}, {two_digits(one / math.sqrt(120))} drowned"]
    assert row(printed, "1,000")[2] == "1.5, 0.42"
    printed = asked(capsys, *CLIENTS, "--noise", "2.08", "--cohort", "250", "--parameters", "1e4")
    assert row(printed, "250") == ["250", "48", "0.83, 0.12"]
    assert not re.search("^ *1,000  ", printed, re.MULTILINE)


def test_with_four_clients_noise_drowns_everything(capsys: pytest.CaptureFixture[str]) -> None:
    printed = asked(capsys, "--clients", "4", "--participations", "12", "--noise", "2.08")
    assert [cell.endswith(" drowned") for cell in row(printed, "4")[2:]] == [True] * 3


def test_more_than_ten_is_not_called_protection(capsys: pytest.CaptureFixture[str]) -> None:
    printed = " ".join(asked(capsys, *CLIENTS, "--noise", "0.5").split())
    assert "That is more than 10: no protection." in printed
    assert "odds" not in printed


def test_noise_for_an_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    printed = asked(capsys, *CLIENTS, "--epsilon", "2")
    assert printed.startswith("epsilon 2.0 at delta 1e-05: noise multiplier 6.9")
    (noise,) = re.findall(r"multiplier ([\d.]+),", printed)
    assert gaussian_epsilon(math.sqrt(12) / float(noise), 1e-5) == pytest.approx(2, rel=1e-3)


def test_single_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    """The value of TensorFlow Privacy's tests: 2.4612381. The noise of a batch of 200 is told only
    if the number of sequences is."""
    flags = ("--unit", "example", "--rate", "0.01", "--steps", "120", "--noise", "0.7")
    printed = asked(capsys, *flags, "--sequences", "20000")
    assert printed.startswith("epsilon 2.5 at delta 1e-05: ")
    assert "whoever wrote several" in printed
    assert row(printed, "0.7")[2] == "2.5"
    one = 0.7 * math.sqrt(500_000) / 200
    assert row(printed, "200")[2] == f"{two_digits(one)}, {two_digits(one / math.sqrt(120))}"
    assert "With --sequences" in asked(capsys, *flags, "--rate", "1")


@pytest.mark.parametrize(("flags", "message"), [
    ((), "fedrun privacy: --unit client needs --clients"),
    (("--clients", "10", "--noise", "1"), "fedrun privacy: --unit client needs --participations"),
    (CLIENTS, "fedrun privacy: needs --noise or --epsilon, one of them"),
    ((*CLIENTS, "--noise", "1", "--epsilon", "1"),
     "fedrun privacy: needs --noise or --epsilon, one of them"),
    ((*CLIENTS, "--noise", "0"), "--noise 0.0: must be 0.001 to 1,000,000"),
    ((*CLIENTS, "--noise", "nan"), "--noise nan: must be 0.001 to 1,000,000"),
    ((*CLIENTS, "--epsilon", "-1"), "--epsilon -1.0: must be 0.001 to 1,000,000"),
    ((*CLIENTS, "--noise", "1", "--delta", "1e-3"),
     "--delta 0.001: must be > 0 and < 1 / clients = 0.001"),
    ((*CLIENTS, "--noise", "1", "--delta", "0"),
     "--delta 0.0: must be > 0 and < 1 / clients = 0.001"),
    ((*CLIENTS, "--noise", "1", "--cohort", "300"),
     "--cohort 300: must be a divisor of --clients 1000, so that all clients train equally often"),
    ((*CLIENTS, "--noise", "1", "--rate", "0.1"),
     "--rate 0.1: must be left out with --unit client"),
    (("--unit", "example", "--rate", "0.1", "--steps", "9", "--noise", "1", "--clients", "9"),
     "--clients 9: must be left out with --unit example"),
    (("--unit", "example", "--rate", "2", "--steps", "9", "--noise", "1"),
     "--rate 2.0: must be > 0 and <= 1"),
    (("--unit", "example", "--rate", "0.1", "--steps", "9", "--noise", "1", "--sequences", "1e5"),
     "--delta 1e-05: must be > 0 and < 1 / sequences = 1e-05"),
    (("--unit", "example", "--rate", "0.1", "--steps", "9", "--noise", "1", "--delta", "1e-13"),
     "delta 1e-13: must be 1e-12 or more for single sequences"),
    ((*CLIENTS, "--noise", "much"), "--noise much: must be a number"),
    (("--clients", "0", "--participations", "1", "--noise", "1"),
     "--clients 0: must be 1 to 1,000,000,000")])
def test_wrong_settings_are_refused_by_name(caplog: pytest.LogCaptureFixture,
                                            flags: tuple[str, ...], message: str) -> None:
    assert refused(caplog, *flags) == message


def test_without_dp_accounting_the_error_names_what_to_install(
        caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "dp_accounting"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    assert refused(caplog, "--unit", "example", "--rate", "0.1", "--steps", "9", "--noise", "1"
                   ).endswith("pip install 'fedrun[privacy]'")


def test_epsilon_is_rounded_to_more() -> None:
    assert [shown(e) for e in (0, 0.0123, 0.5, 1, 7.9965, 8.0, 8.04, 99.99, 100.5, math.inf)] == [
        "0.0", "0.013", "0.50", "1.0", "8.0", "8.0", "8.1", "100.0", "101", "inf"]


def test_it_does_without_torch() -> None:
    done = fresh_python("import sys\nfrom fedrun import cli\n"
                        "cli.main(['privacy', '--clients', '10', '--participations', '1', "
                        "'--noise', '5', '--cohort', '5'])\n"
                        "print({'torch', 'dp_accounting'} & set(sys.modules))")
    assert done.strip().splitlines()[-1] == "set()"
