"""check_student.py and docs/course.md: hand-outs, likely mistakes, wrong names, the page."""

import ast
import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import check_student
import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/course.md").read_text()
NAMES = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M)  # the table of functions to blank
MISTAKES = {  # of a function: what of its script is replaced, by what, what the check then says
    "simclr.nt_xent_loss": [
        ("logits.scatter_(dim=1, index=itself[:, None], value=-math.inf)", "pass",
         "the loss at temperature 0.1: an embedding is compared with itself, too"),
        ("log_sums.mean() - positives.mean()", "2 * (log_sums.mean() - positives.mean())",
         "the loss at temperature 0.1: 0.42388 is 2.000 times the expected 0.21194"),
        ("logits.amax(dim=1)", "0 * logits.amax(dim=1)", "subtract each row's largest first"),
        ("z.to(torch.promote_types(z.dtype, torch.float32)), dim=2", "z, dim=2",
         "of bfloat16 inputs it is computed in float32: with --bf16"),
        ("return log_sums.mean()", "log_sums.mean()", "is a `return` missing?"),
        ("log_sums.mean() - positives.mean()", "log_sums - positives.repeat(2)", "shape (32,)"),
        ("log_sums.mean() - positives.mean()", "(log_sums.mean() - positives.mean()).item()",
         "none leaves the loss"),
        ("@ candidates.T", "@ candidates[1:].T", "RuntimeError: index 31 is out of bounds"),
    ],
    "vicreg.vicreg_loss": [
        (" * N / (N - 1)", "", "variance: the variance is divided by N"),
        ("(squares - variances.square().sum())", "squares", "WRONG  covariance: "),
        ("F.mse_loss(z1, z2)", "F.l1_loss(z1, z2)", "invariance: "),
        ("(variances + 1e-4)", "variances", "has no gradient at 0: add 1e-4"),
        ("sim_coeff * invariance", "25.0 * invariance", "the loss with coefficients 2, 3 and 4: "),
        ("return loss, invariance, variance, covariance", "return loss",
         "a Tensor is returned, not the tuple (loss, invariance, variance, covariance)"),
        ("torch.promote_types(z1.dtype, torch.float32)", "z1.dtype", "with --bf16"),
    ],
    "msn.msn_loss": [
        ("prototypes, temperature * sharpen)", "prototypes, temperature)",
         "plain targets: cross_entropy: targets are not sharpened"),
        ("with torch.no_grad():  # targets", "if True:  # targets",
         "gradient, by targets: labels get none: compute them under torch.no_grad()"),
        ("cross_entropy + me_max_weight * me_max", "cross_entropy + me_max",
         "plain targets: loss = cross_entropy + 5 me_max: "),
        (" - prior.log().to(mean_p)", "", "me_max: "),
        ("mean_p.clamp(min=tiny)", "mean_p", "0 log 0 is 0"),
        ("F.normalize(z.to(prototypes))", "F.normalize(z).to(prototypes)", "of bfloat16"),
    ],
    "msn.sinkhorn_balance": [
        ("        assignment = assignment / assignment.sum(",
         "        if _ < rounds - 1:\n            assignment = assignment / assignment.sum(",
         "three rounds to a power law: a round ends with the images"),
        ("(prior / mass)", "(1 / len(mass) / mass)", "share of the prior: off by "),
        ("mass.clamp(min=torch.finfo(mass.dtype).tiny)", "mass", "clamp it before you divide"),
        (".to(assignment)\n", "\n", "float32 stays float32"),
        ("assignment * (prior / mass).to(assignment)", "assignment.mul_(prior / mass)",
         "the argument stays as it was"),
    ],
    "msn.schedule": [
        ("now = step + 1", "now = step", "lr of a run of 35 updates: one update late"),
        ("* step / (1.25 * run_steps)", "* step / run_steps", "ema of a run of 35 updates: off"),
    ],
    "pmsn.pmsn_loss": [
        ("kl = (mean_p * log_ratio).sum()", "kl = -(prior * log_ratio).sum()",
         "exponent 1: kl: the reversed divergence, KL(prior || mean)"),
        ("prior.to(prototypes.device).clamp(min=tiny)", "prior", "the log of 0 is infinite"),
        ("sinkhorn_balance(t, prior)",
         "sinkhorn_balance(t, torch.full_like(prior, 1 / len(prior)))", "follows the prior: "),
        ("prototypes, temperature * sharpen)", "prototypes, temperature)", "1: cross_entropy: "),
        ("with torch.no_grad():  # targets", "if True:  # targets", "labels get none"),
        ("mean_p.clamp(min=tiny)", "mean_p", "0 log 0 is 0"),
        ("F.normalize(z.to(prototypes))", "F.normalize(z).to(prototypes)", "of bfloat16"),
    ],
    "mae.MAE.forward": [
        ("(inverse >= kept)", "(order >= kept)",
         "the mask: 1 but for the smallest noise: order and its inverse are exchanged"),
        ("order[:, :kept]), inverse)", "order[:, :kept]), order)", "the image's order: off by "),
        ("torch.rand(len(images), N, device=images.device)",
         "torch.rand(N).expand(len(images), -1)", "draw noise of shape (B, N) at each call"),
        ("int(N * (1 - mask_ratio))", "math.ceil(N * (1 - mask_ratio))", "rounded down: 1.250"),
    ],
    "mae.mae_loss": [
        ("(error * mask).sum() / mask.sum()", "error.mean()",
         "the loss, norm_pix_loss=False: all patches count"),
        ("pred.to(patches) - patches", "pred - patches.to(pred)", "of bfloat16"),
    ],
    "data2vec.block_mask": [
        ("<= room:", "< 99:", "refuse a block without room"),
        ("for _ in range(10):", "while True:", "not done after 1 s: an endless loop? (line "),
        ("left = rng.randint(", "left = random.randint(", "draw from rng"),
        (".view(g, g)", ".view(g, g).long()", "WRONG  a bool tensor (14, 14)\n"),
        ("rng.uniform(math.log(0.3), math.log(1 / 0.3))", "0.0", "edges between masked"),
        ("top = rng.randint(0, g - height)", "top = 0", "equally likely wherever it fits"),
    ],
    "data2vec.data2vec_targets": [
        ("return F.layer_norm(mean, mean.shape[2:])", "return mean",
         "the mean of the layers is not normalised"),
        ("[-top_k:]", "[-6:]", "top_k=8: off by "),
        ("x[:, 1:] for", "x for", "shape (3, 17, 24) instead of (3, 16, 24)"),
        ("torch.promote_types(x.dtype, torch.float32)", "x.dtype", "of bfloat16"),
    ],
    "data2vec.data2vec_loss": [
        (", beta=beta)", ")", "the loss, beta 0.12: beta is ignored"),
        ("pred.to(target), target,", "pred.detach().to(target), target,", "none leaves the loss"),
        ("pred.to(target), target,", "pred, target.to(pred),", "of bfloat16"),
    ],
    "sampler.KClassBatchSampler": [
        ("self.dealt + self.rng.random(len(self.dealt))", "self.rng.random(len(self.dealt))",
         "deal the least dealt classes first"),
        ("self.dealt + self.rng.random(len(self.dealt))", "self.dealt", "break ties"),
        ("least + (np.arange(k_classes) < larger)", "least + larger * (np.arange(k_classes) < 1)",
         "K = 3 of 16 classes: equal shares in a batch: 13 to 15, where 13 or 14 are due"),
        ("order[: len(self.shares)]", "order[np.arange(len(self.shares)) // 2]",
         "K = 3 of 16 classes: K are in every batch"),
        ("cards = np.resize(queue, number)", "cards = rng.choice(queue, number)", "like cards"),
        ("cards = np.resize(queue, number)", "cards = queue[[0] * number]", "before you shuffle"),
        ("rng.permutation(deck[:spent])", "deck[:spent]", "shuffle it again when it is used up"),
        ("default_rng([seed, batch_size, k_classes])", "default_rng()", "join to those of one"),
        ("return np.concatenate(hands)", "return np.concatenate(hands)[1:]", "batches of [40]"),
    ],
    "sampler.power_law_prior": [
        ("return weights / weights.sum()", "return weights", "divide by their sum"),
        ("1, dtype=torch.float64)", "1, dtype=torch.float32)", "WRONG  a float64 tensor\n"),
        ("if num_prototypes < 1:", "if num_prototypes < 0:", "WRONG  no prototypes: ValueError\n"),
        ("** -exponent\n", "** exponent - 0.5\n", "10 prototypes, exponent 0.25: off by "),
    ],
}  # fmt: skip


def run(*arguments):
    """What a command prints: exit status, stdout, stderr."""
    out = io.StringIO()
    errors = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = check_student.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), errors.getvalue()


@functools.cache
def output_of(name, old, new):
    """What the check of a script with this mistake prints; it fails."""
    script = f"{name.split('.')[0]}.py"
    source = (ROOT / script).read_text()
    assert old in source, old
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / script
        path.write_text(source.replace(old, new))
        with mock.patch.object(check_student, "SECONDS", 1 if new == "while True:" else 100):
            status, output, errors = run(name, "--file", path)
    assert status == 1 and errors == "" and "Traceback" not in output
    return output


# ---- 1. Hand-outs


def test_the_page_lists_all_functions():
    assert NAMES == list(check_student.EXERCISES) == list(MISTAKES)


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_fails_and_the_original_passes(name, tmp_path):
    script = f"{name.split('.')[0]}.py"
    out = tmp_path / "assignment" / script
    status, output, errors = run("--blank", name, "--out", out)
    assert (status, errors) == (0, "") and f"check_student.py {name} --file {out}" in output
    assert {path.name for path in out.parent.iterdir()} == {script, "sampler.py"}
    assert_only_bodies_are_blank((ROOT / script).read_text(), out.read_text(), name)
    status, output, errors = run(name, "--file", out)
    assert (status, errors) == (1, "") and " is still blank\n" in output
    shutil.copy(ROOT / script, out)
    status, output, errors = run(name, "--file", out)
    assert (status, errors) == (0, "") and "WRONG" not in output
    assert output.endswith(f"{name}: all {output.count('ok  ')} properties hold\n")


def assert_only_bodies_are_blank(original, text, name):
    """Signatures and docstrings stay, and so does all that is not the exercise's."""
    definitions = check_student.EXERCISES[name][1]
    assert text.count(check_student.BLANK) == len(definitions)
    assert outline(text, definitions) == outline(original, definitions)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(original))


def outline(source, definitions):
    """The source without what follows the docstrings of functions with these names."""
    tree = ast.parse(source)
    names = {definition.split(".")[-1] for definition in definitions}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.body = node.body[: ast.get_docstring(node) is not None]
    return ast.dump(tree)


def test_several_functions_can_be_blanked_at_once_or_later(tmp_path):
    out = tmp_path / "my_msn.py"
    assert run("--blank", "msn.msn_loss", "msn.sinkhorn_balance", "--out", out)[0] == 0
    assert "msn_loss is still blank" in run("msn.msn_loss", "--file", out)[1]
    assert "sinkhorn_balance is still blank" in run("msn.sinkhorn_balance", "--file", out)[1]
    again = tmp_path / "again.py"
    assert run("--blank", "msn.schedule", "--file", out, "--out", again)[0] == 0
    assert again.read_text().count(check_student.BLANK) == 4


# ---- 2. Answers


@pytest.mark.parametrize("name", NAMES)
def test_likely_mistakes_are_named_and_every_property_can_fail(name):
    printed = ""
    for old, new, says in MISTAKES[name]:
        output = output_of(name, old, new)
        wrong = re.sub(r"^ok .*\n", "", output, flags=re.M)
        assert says in wrong, f"{says}\n{wrong}"
        printed += wrong
    properties = re.findall(r"^ok     (.*)$", run(name)[1], re.M)
    assert properties
    for text in properties:
        assert re.search(f"^WRONG  {re.escape(text)}(: |$)", printed, re.M), text


def test_right_answers_may_look_otherwise(tmp_path):
    """By another road, and in float32 throughout."""
    other = """z = F.normalize(torch.cat([z1, z2]).float())
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=bool), -1e9)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))
"""
    out = tmp_path / "mine.py"
    run("--blank", "simclr.nt_xent_loss", "--out", out)
    out.write_text(out.read_text().replace(check_student.BLANK, other))
    status, output, _ = run("simclr.nt_xent_loss", "--file", out)
    assert status == 0, output


# ---- 3. Wrong names and files


def test_wrong_names_and_files_are_refused(tmp_path):
    loss = "simclr.nt_xent_loss"
    empty = tmp_path / "empty.py"
    empty.write_text("")
    broken = tmp_path / "broken.py"
    broken.write_text("import math\ndef nt_xent_loss(:\n    pass\n")
    foreign = tmp_path / "foreign.py"
    foreign.write_text("import no_such_module\n")
    new = tmp_path / "new.py"
    for arguments, says in (
        ([], "--list shows all"),
        (["--lists"], "--lists: see --help"),
        (["simclr.ntxent"], "'simclr.ntxent' (choose from"),
        ([loss, "--file", tmp_path / "none.py"], "No such file"),
        ([loss, "--file", tmp_path], "Is a directory"),
        ([loss, "--file", empty], "empty.py has no nt_xent_loss: give --file"),
        ([loss, "--file", broken], "SyntaxError: invalid syntax (broken.py, line 2)"),
        ([loss, "--file", foreign], "(line 1 of foreign.py)"),
        (["mae.MAE.forward", "--file", ROOT / "simclr.py"], "has no MAE.forward"),
        (["--blank", loss], "--blank FUNCTION and --out FILE"),
        ([loss, "--blank", loss, "--out", new], "--blank FUNCTION and --out FILE"),
        (["--blank", "simclr.loss", "--out", new], "'simclr.loss' (choose from"),
        (["--blank", loss, "mae.mae_loss", "--out", new], "mae and simclr are two scripts"),
        (["--blank", loss, "--out", empty], "File exists"),
        (["--blank", loss, "--file", empty, "--out", new], "empty.py has no nt_xent_loss"),
    ):
        status, output, errors = run(*arguments)
        assert status == 2 and output == "" and errors.count("\n") == 1, errors
        assert errors.startswith("check_student.py: error: ") and says in errors, errors
    assert not new.exists() and empty.read_text() == ""


def test_the_command_line_as_a_student_types_it(tmp_path):
    """In the hand-out's folder, which has only what the page says."""
    run("--blank", "sampler.power_law_prior", "--out", tmp_path / "sampler.py")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/check_student.py", tmp_path / "tests")
    shutil.copytree(ROOT / "tests/golden", tmp_path / "tests/golden")
    command = [sys.executable, "tests/check_student.py", "sampler.power_law_prior"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.startswith("WRONG  sampler.power_law_prior: power_law_prior is still blank")
    assert run("--list") == (0, "\n".join(check_student.EXERCISES) + "\n", "")


# ---- 4. The page


def test_the_output_on_the_page_is_real(tmp_path):
    blank = tmp_path / "blank.py"
    run("--blank", "simclr.nt_xent_loss", "--out", blank)
    printed = run("simclr.nt_xent_loss", "--file", blank)[1] + run("simclr.nt_xent_loss")[1]
    for name, mistakes in MISTAKES.items():
        for old, new, _ in mistakes:
            printed += output_of(name, old, new).replace("after 1 s", "after 20 s")
    printed = re.sub(r"\(line \d+ of", "(line N of", printed).splitlines()
    shown = "".join(re.findall(r"```text\n(.*?)```", PAGE, re.S))
    assert shown.count("WRONG") >= 5
    for line in shown.splitlines():
        assert re.sub(r"\(line \d+ of", "(line N of", line) in printed, line
