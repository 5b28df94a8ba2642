"""check_student.py and docs/course.md: hand-outs, typical mistakes, wrong names, the page."""

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
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/course.md").read_text()
NAMES = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M)  # the table of functions to blank
MISTAKES = {  # of a function: what of its script is replaced, by what, what the check then says
    "simclr.nt_xent_loss": [
        ("logits.scatter_(dim=1, index=itself[:, None], value=-math.inf)", "pass",
         "leave k = i out"),
        ("        highest =", "        logits[anchor, itself - N] = -math.inf\n        highest =",
         "the positive is not in the sum"),
        ("return log_sums.mean() - positives.mean()",
         "return 2 * (log_sums.mean() - positives.mean())",
         "your loss is 2.000 times the expected one (0.211941): a mean over 2 views, or a sum?"),
        (" / temperature", "", "the temperature is missing"),
        (" / temperature", " * temperature", "multiplied by the temperature"),
        ("F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=2)",
         "z.to(torch.promote_types(z.dtype, torch.float32))", "cosines are wanted"),
        ("z.to(torch.promote_types(z.dtype, torch.float32)), dim=2", "z, dim=2",
         "not computed in float32"),
        ("logits.amax(dim=1)", "0 * logits.amax(dim=1)", "subtract each row's"),
        ("(z[0] * z[1])", "(z[0] * z[1].detach())", "your gradient of z2 is off"),
        ("return log_sums.mean() - ", "return -log_sums.mean() + ", "its sign?"),
        ("return log_sums.mean() - positives.mean()",
         "return (log_sums.mean() - positives.mean()).item()", "no .item()"),
        ("return log_sums.mean()", "log_sums.mean()", "is a `return` missing?"),
        ("log_sums.mean() - positives.mean()", "log_sums - positives.repeat(2)",
         "a mean or a sum is missing"),
        ("@ candidates.T", "@ candidates[1:].T", "(line "),
    ],
    "vicreg.vicreg_loss": [
        (" * N / (N - 1)", "", "the variance is divided by N"),
        ("(squares - variances.square().sum())", "squares", "the diagonal counts"),
        ("(variances + 1e-4)", "variances", "1e-4 is missing"),
        ("(variances + 1e-4)", "variances", "has no gradient at 0"),
        ("(variances + 1e-4).sqrt()", "(variances + 1e-4)", "its square root"),
        ("variance1 / 2 + variance2 / 2", "variance1 + variance2", "2 views"),
        ("(2 * squares - squares.detach())", "squares", "your gradient of x is off"),
        ("F.mse_loss(z1, z2)", 'F.mse_loss(z1, z2, reduction="sum") / len(z1)', "24.000 times"),
        ("z - all_reduce_mean(z.mean(dim=0))", "z", "not centred"),
        ("return loss, invariance, variance, covariance", "return loss",
         "not the tuple (loss, invariance, variance, covariance)"),
        ("torch.promote_types(z1.dtype, torch.float32)", "z1.dtype", "not computed in float32"),
    ],
    "msn.msn_loss": [
        ("prototypes, temperature * sharpen)", "prototypes, temperature)",
         "targets are not sharpened"),
        ("with torch.no_grad():  # targets", "if True:  # targets",
         "targets must not get a gradient: compute them under torch.no_grad()"),
        ("with torch.no_grad():  # targets", "targets = targets.detach()\n    if True:  #",
         "compute them under torch.no_grad(), prototypes included"),
        ("log_p.unflatten(0, (-1, len(t)))", "log_p.unflatten(0, (len(t), -1)).transpose(0, 1)",
         "anchors come view after view"),
        ("cross_entropy + me_max_weight * me_max", "cross_entropy + me_max",
         "the weight is ignored"),
        ("cross_entropy + me_max_weight * me_max", "cross_entropy - 5 * me_max",
         "the sign of the second term is wrong"),
        (" - prior.log().to(mean_p)", "", "this is minus the entropy"),
        ("mean_p.clamp(min=tiny)", "mean_p", "0 log 0 is 0"),
        ("        if sinkhorn:\n", "        if not sinkhorn:\n",
         "targets are balanced, though sinkhorn=False"),
        ("all_reduce_mean(log_p.exp().mean(dim=0))", "all_reduce_mean(t.mean(dim=0))",
         "the mean of the targets"),
    ],
    "msn.sinkhorn_balance": [
        ("prior, rounds=3", "prior, rounds=2", "one round too few"),
        ("(prior / mass)", "(1 / len(mass) / mass)", "the prior is ignored"),
        ("mass.clamp(min=torch.finfo(mass.dtype).tiny)", "mass", "clamp it"),
        ("assignment.sum(dim=1, keepdim=True)",
         "assignment.sum(dim=1, keepdim=True) / len(assignment)", "16 images"),
        ("assignment * (prior / mass).to(assignment)", "assignment.mul_(prior / mass)",
         "work on a new tensor"),
    ],
    "msn.schedule": [
        ("now = step + 1", "now = step", "one update late"),
        ("now = step + 1", "now = step + 2", "one update early"),
        ("int(1.25 * run_steps)", "run_steps", "1.25 times the run"),
        ("* step / (1.25 * run_steps)", "* step / run_steps", "1.25 times the run"),
    ],
    "pmsn.pmsn_loss": [
        ("kl = (mean_p * log_ratio).sum()", "kl = -(prior * log_ratio).sum()",
         "the reversed divergence, KL(prior || mean)"),
        ("prior.to(prototypes.device).clamp(min=tiny)", "prior", "the log of 0 is infinite"),
        ("sinkhorn_balance(t, prior)",
         "sinkhorn_balance(t, torch.full_like(prior, 1 / len(prior)))",
         "balanced to the uniform prior"),
        ("- prior.log().to(mean_p)", "+ math.log(len(prior))", "the prior is ignored"),
        ("with torch.no_grad():  # targets", "if True:  # targets",
         "targets must not get a gradient"),
    ],
    "mae.MAE.forward": [
        ("(inverse >= kept)", "(inverse < kept)", "the mask is upside down"),
        ("(inverse >= kept)", "(order >= kept)", "order and its inverse"),
        ("noise.argsort(dim=1)", "noise.argsort(dim=1, descending=True)",
         "the patches of the largest noise are kept"),
        ("order[:, :kept]), inverse)", "order[:, :kept]), order)",
         "give decode the inverse permutation"),
        ("torch.rand(len(images), N, device=images.device)",
         "torch.rand(N).expand(len(images), -1)", "all images have the same mask"),
        ("int(N * (1 - mask_ratio))", "math.ceil(N * (1 - mask_ratio))", "rounded up"),
        ("encode(images, order[:, :kept])", "encode(images[:, :2], order[:, :kept])",
         "RuntimeError"),
    ],
    "mae.mae_loss": [
        ("(error * mask).sum() / mask.sum()", "error.mean()", "all patches count"),
        ("(error * mask).sum() / mask.sum()",
         "((error * mask).sum(dim=1) / mask.sum(dim=1)).mean()", "a mean of means"),
        ("(error * mask).sum() / mask.sum()", "(error * mask).sum() / mask.numel()",
         "divided by the number of all"),
        ("(error * mask)", "(error * (1 - mask))", "WRONG  visible patches"),
        (".square().mean(dim=2)", ".square().sum(dim=2)", "192 values"),
        ("    if norm_pix_loss:", "    if not norm_pix_loss:",
         "this is the loss with norm_pix_loss=True"),
        ("torch.var_mean(patches, dim=2, keepdim=True)",
         "torch.var_mean(patches, dim=2, keepdim=True, correction=0)", "by n - 1 (unbiased)"),
        ("pred.to(patches) - patches", "pred - patches.to(pred)", "not computed in float32"),
    ],
    "data2vec.block_mask": [
        ("<= room:", "< 99:", "refuse a block without room"),
        ("for _ in range(10):", "while True:", "an endless loop?"),
        ("patch in masked", "patch not in masked", "True means masked"),
        ("left = rng.randint(", "left = random.randint(", "draw from rng"),
        ("rng.uniform(math.log(0.3), math.log(1 / 0.3))", "0.0", "aspect log-uniform"),
        (".view(g, g)", ".view(g, g).long()", "is wanted, not torch.int64"),
    ],
    "data2vec.data2vec_targets": [
        ("[-top_k:]", "[:top_k]", "the last top_k are wanted"),
        ("return F.layer_norm(mean, mean.shape[2:])", "return mean",
         "the mean of the layers is not normalised"),
        ("sum(F.layer_norm(x, x.shape[2:]) for x in layers)", "sum(layers)",
         "not normalised one by one"),
        ("x[:, 1:] for", "x for", "the cls token is among the targets"),
        ("[-top_k:]", "[-6:]", "top_k is ignored"),
        ("torch.promote_types(x.dtype, torch.float32)", "x.dtype", "not computed in float32"),
    ],
    "data2vec.data2vec_loss": [
        (", beta=beta)", ")", "beta is ignored"),
        ("F.smooth_l1_loss(pred.to(target), target, beta=beta)",
         "F.huber_loss(pred.to(target), target, delta=beta)", "divide it by beta"),
        ("F.smooth_l1_loss(pred.to(target), target, beta=beta)", "F.mse_loss(pred, target)",
         "this is the mean squared error"),
        ("pred.to(target), target,", "pred, target.to(pred),", "not computed in float32"),
    ],
    "sampler.KClassBatchSampler": [
        ("dealt + rng.random(len(dealt))", "rng.random(len(dealt))",
         "deal the least dealt classes first"),
        ("dealt + rng.random(len(dealt))", "dealt", "break ties between classes at random"),
        ("default_rng([self.seed, self.epoch])", "default_rng()", "seed a generator with"),
        ("default_rng([self.seed, self.epoch])", "default_rng(self.seed)",
         "both belong in the generator"),
        ("rng.permutation(batch)[self.share]", "batch[self.share]", "a process gets whole classes"),
        ("[: self.k_classes]\n", "[: self.k_classes - 1]\n", "(line "),
        ("short = spent[classes] + counts > self.sizes[classes]", "short = spent[classes] < 0",
         "IndexError"),
        ("(np.arange(self.k_classes) < larger)", "larger * (np.arange(self.k_classes) == 0)",
         "images, where 13.7 is due"),
        ("batch[self.share].tolist()\n            return",
         "np.sort(batch)[self.share].tolist()[:-1]\n            return", "images, not 60"),
    ],
    "sampler.power_law_prior": [
        ("arange(1, num_prototypes + 1,", "arange(2, num_prototypes + 2,", "it counts from 1"),
        ("** -exponent\n    return weights / weights.sum()", "** -exponent\n    return weights",
         "divide by their sum"),
        ("** -exponent\n", "** exponent\n", "the sign of the exponent"),
        ("1, dtype=torch.float64)", "1, dtype=torch.float32)", "torch.float32 comes out"),
        ("if num_prototypes < 1:", "if num_prototypes < 0:", "no error is raised"),
    ],
}  # fmt: skip
CASES = [(name, *mistake) for name, mistakes in MISTAKES.items() for mistake in mistakes]


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
def output_of(mistake):
    """What the check of a script with this mistake prints; it fails."""
    name, old, new, says = mistake
    script = f"{name.split('.')[0]}.py"
    source = (ROOT / script).read_text()
    assert old in source, old
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / script
        path.write_text(source.replace(old, new))
        with mock.patch.object(check_student, "SECONDS", 0.5 if "endless" in says else 100):
            status, output, errors = run(name, "--file", path)
    assert status == 1 and errors == "" and "Traceback" not in output
    return output


# ---- 1. Hand-outs


def test_the_page_lists_all_functions():
    assert NAMES == list(dict.fromkeys(NAMES)) and set(NAMES) == set(check_student.EXERCISES)
    assert list(MISTAKES) == NAMES
    for name in NAMES:
        assert f"`python tests/check_student.py {name}`" in PAGE


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_fails_and_the_original_passes(name, tmp_path):
    script = f"{name.split('.')[0]}.py"
    out = tmp_path / "assignment" / script
    status, output, errors = run("--blank", name, "--out", out)
    assert (status, errors) == (0, "") and f"check_student.py {name} --file {out}" in output
    assert {path.name for path in out.parent.iterdir()} == {script, "sampler.py"}
    status, output, errors = run(name, "--file", out)
    assert (status, errors) == (1, "") and " is still blank\n" in output
    shutil.copy(ROOT / script, out)
    status, output, errors = run(name, "--file", out)
    assert (status, errors) == (0, "") and "WRONG" not in output
    assert output.endswith(f"{name}: all {output.count('ok  ')} properties hold\n")


@pytest.mark.parametrize("name", NAMES)
def test_only_the_bodies_are_blanked(name, tmp_path):
    script = f"{name.split('.')[0]}.py"
    definitions = check_student.EXERCISES[name][1]
    run("--blank", name, "--out", tmp_path / "blank.py")
    original = (ROOT / script).read_text()
    parts = (tmp_path / "blank.py").read_text().split(check_student.BLANK)
    assert len(parts) == len(definitions) + 1
    assert original.startswith(parts[0]) and original.endswith(parts[-1])
    assert all(part in original for part in parts)
    theirs = definitions_of(original)
    blank = definitions_of((tmp_path / "blank.py").read_text())
    assert list(theirs) == list(blank)
    for path, node in theirs.items():
        assert ast.get_docstring(node) == ast.get_docstring(blank[path])
        if path in definitions:
            body = blank[path].body[ast.get_docstring(node) is not None :]
            assert [ast.unparse(line) for line in body] == ["raise NotImplementedError('write me')"]
            assert ast.dump(node.args) == ast.dump(blank[path].args)


def definitions_of(source):
    """{dotted name: its node}, of functions, classes and methods."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner
    return found


def test_several_functions_of_one_script_can_be_blanked(tmp_path):
    out = tmp_path / "my_msn.py"
    assert run("--blank", "msn.msn_loss", "msn.sinkhorn_balance", "--out", out)[0] == 0
    assert "msn_loss is still blank" in run("msn.msn_loss", "--file", out)[1]
    assert "sinkhorn_balance is still blank" in run("msn.sinkhorn_balance", "--file", out)[1]
    again = tmp_path / "again.py"
    assert run("--blank", "msn.schedule", "--file", out, "--out", again)[0] == 0
    assert again.read_text().count(check_student.BLANK) == 4


def test_a_helper_that_is_still_blank_is_named(tmp_path):
    """The student has written the loss, but not the function that it calls."""
    out = tmp_path / "my_vicreg.py"
    run("--blank", "vicreg.vicreg_loss", "--out", out)
    loss = check_student.BLANK + "\n\n\ndef variance"
    assert loss in out.read_text()
    call = "return variance_and_covariance(z1)\n\n\ndef variance"
    out.write_text(out.read_text().replace(loss, call))
    status, output, _ = run("vicreg.vicreg_loss", "--file", out)
    assert status == 1 and "variance_and_covariance is still blank" in output


# ---- 2. Typical mistakes


@pytest.mark.parametrize("mistake", CASES, ids=[f"{case[0]}: {case[3]}" for case in CASES])
def test_mistakes_get_a_helpful_message(mistake):
    wrong = [line for line in output_of(mistake).splitlines() if line.startswith("WRONG")]
    assert any(mistake[3] in line for line in wrong), wrong


def test_errors_name_the_line_once(tmp_path):
    source = (ROOT / "simclr.py").read_text()
    old = "B = len(z1)\n"
    line = source[: source.index(old)].count("\n") + 1
    (tmp_path / "mine.py").write_text(source.replace(old, "B = len(z9)\n", 1))
    status, output, _ = run("simclr.nt_xent_loss", "--file", tmp_path / "mine.py")
    assert status == 1 and output.count(f"NameError: name 'z9' is not defined (line {line} of") == 1
    assert output.count(": the same as above\n") == 6
    assert output.endswith("simclr.nt_xent_loss: 7 of 7 properties wrong\n")


def test_an_error_outside_the_function_is_a_line_too(tmp_path):
    source = (ROOT / "mae.py").read_text().replace("super().__init__()", "super().__init__(1)", 1)
    (tmp_path / "mae.py").write_text(source)
    status, output, _ = run("mae.MAE.forward", "--file", tmp_path / "mae.py")
    assert status == 1 and output.startswith("WRONG  mae.MAE.forward: TypeError: ")
    assert " of mae.py)\n" in output


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


def test_the_slow_versions_are_the_recorded_ones():
    """What mistakes are told by: right where it should be, and no mistake is right."""
    z1, z2 = (torch.from_numpy(check_student.load("simclr_loss")[name]) for name in ("z1", "z2"))
    golden = check_student.load("simclr_loss")["t01_loss_mean"]
    loss = check_student.nt_xent_rows(check_student.cosines_of(z1, z2) / 0.1).mean()
    assert_told_apart(loss, golden, check_student.wrong_nt_xents(z1, z2, 0.1))

    golden = check_student.load("vicreg_loss")
    x, y = (torch.from_numpy(golden[name]) for name in "xy")
    wrong = check_student.wrong_vicregs(x, y)
    terms = dict(zip(wrong, check_student.slow_vicreg(x, y)))
    for name, short in (("invariance", "sim"), ("variance", "std"), ("covariance", "cov")):
        assert_told_apart(terms[name], golden[f"{short}_loss"], wrong[name])

    golden = check_student.load("pmsn_loss")
    inputs = check_student.siamese_inputs(golden, "")
    prior = check_student.power_law(40, 1.0)
    for sinkhorn, key in ((False, "e100"), (True, "e100_sinkhorn")):
        terms = check_student.slow_siamese(inputs, prior, sinkhorn=sinkhorn)
        wrong = check_student.wrong_siamese(inputs, prior, sinkhorn)
        value = terms["cross_entropy"].detach()
        assert_told_apart(value, golden[f"{key}_cross_entropy"], wrong["cross_entropy"])
        assert_told_apart(terms["divergence"].detach(), golden["e100_kl"], wrong["divergence"])

    golden = check_student.load("mae_forward")
    pred, mask = (torch.from_numpy(golden[f"loss_only/{x}"]).double() for x in ("pred", "mask"))
    patches = check_student.cut_patches(torch.from_numpy(golden["loss_only/images"])).double()
    for kind in ("rawpix", "normpix"):
        normalise = kind == "normpix"
        loss = check_student.slow_mae_loss(pred, patches, mask, normalise)
        wrong = check_student.wrong_mae_losses(pred, patches, mask, normalise)
        assert_told_apart(loss, golden[f"loss_only/expected_{kind}"], wrong)

    layers = torch.from_numpy(check_student.load("data2vec_targets")["teacher_layers"]).double()
    golden = check_student.load("data2vec_targets")["target_all/official"]
    np.testing.assert_allclose(check_student.slow_targets(layers, 6), golden, atol=1e-5)


def assert_told_apart(value, golden, wrong):
    np.testing.assert_allclose(value, golden, rtol=1e-6)
    for text, other in wrong.items():
        other = check_student.array(other)
        assert np.isfinite(other) and not check_student.near(other, golden, check_student.RTOL)
        assert len(text) < 90 and text.count(":") <= 1


# ---- 3. Wrong names and files


def assert_refused(*arguments, words):
    status, output, errors = run(*arguments)
    assert status == 2 and output == "" and errors.count("\n") == 1, errors
    assert errors.startswith("check_student.py: error: ")
    for word in words:
        assert word in errors, errors


def test_wrong_names_and_files_are_refused(tmp_path):
    loss = "simclr.nt_xent_loss"
    empty = tmp_path / "empty.py"
    empty.write_text("")
    broken = tmp_path / "broken.py"
    broken.write_text("import math\ndef nt_xent_loss(:\n    pass\n")
    foreign = tmp_path / "foreign.py"
    foreign.write_text("import no_such_module\n")
    picture = tmp_path / "picture.py"
    picture.write_bytes(b"\xff\xfe\x00")
    new = tmp_path / "new.py"
    for arguments, words in (
        ([], ["--list"]),
        (["--lists", "3"], ["--lists", "--help"]),
        (["simclr.ntxent"], ["simclr.ntxent", "choose", *check_student.EXERCISES]),
        ([loss, "--file", tmp_path / "none.py"], ["none.py: No such file", "give"]),
        ([loss, "--file", tmp_path], ["Is a directory", "give"]),
        ([loss, "--file", empty], ["empty.py has no nt_xent_loss", "give --file"]),
        ([loss, "--file", broken], ["SyntaxError", "(line 2 of broken.py)", "correct it"]),
        ([loss, "--file", foreign], ["ModuleNotFoundError", "(line 1 of foreign.py)"]),
        ([loss, "--file", picture], ["no text file"]),
        (["mae.MAE.forward", "--file", ROOT / "simclr.py"], ["has no MAE.forward"]),
        (["--blank", loss], ["--out"]),
        ([loss, "--out", new], ["--blank"]),
        ([loss, "--blank", loss, "--out", new], ["not both"]),
        (["--blank", "simclr.loss", "--out", new], ["simclr.loss", "choose"]),
        (["--blank", loss, "mae.mae_loss", "--out", new], ["mae and simclr are two scripts"]),
        (["--blank", loss, "--out", empty], ["empty.py exists", "remove it"]),
        (["--blank", loss, "--out", empty / "new.py"], ["give another name"]),
        (["--blank", loss, "--file", broken, "--out", new], ["SyntaxError", "correct it"]),
        (["--blank", loss, "--file", empty, "--out", new], ["empty.py has no nt_xent_loss"]),
    ):
        assert_refused(*arguments, words=words)
    assert not new.exists() and empty.read_text() == ""


def test_the_list(tmp_path):
    assert run("--list") == (0, "\n".join(check_student.EXERCISES) + "\n", "")


def test_the_command_line_as_a_student_types_it(tmp_path):
    """In the hand-out's folder, which has only what the page says."""
    out = tmp_path / "sampler.py"
    run("--blank", "sampler.power_law_prior", "--out", out)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/check_student.py", tmp_path / "tests")
    shutil.copytree(ROOT / "tests/golden", tmp_path / "tests/golden")
    command = [sys.executable, "tests/check_student.py", "sampler.power_law_prior"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.startswith(
        "WRONG  2 prototypes, exponent 0: power_law_prior is still blank\n"
    )


# ---- 4. The page


def without_places(text):
    return re.sub(r"\(line \d+ of", "(line N of", text)


def test_the_output_on_the_page_is_real(tmp_path):
    shown = [line for block in re.findall(r"```text\n(.*?)```", PAGE, re.S)
             for line in block.splitlines()]  # fmt: skip
    assert sum(line.startswith("WRONG") for line in shown) >= 5
    printed = {line for case in CASES for line in output_of(case).splitlines()}
    blank = tmp_path / "blank.py"
    run("--blank", "simclr.nt_xent_loss", "--out", blank)
    printed |= set(run("simclr.nt_xent_loss", "--file", blank)[1].splitlines())
    printed |= set(run("simclr.nt_xent_loss")[1].splitlines())
    printed |= set(run("simclr.nt_xent")[2].splitlines())
    printed = {without_places(line).replace("0.5 s", "10 s") for line in printed}
    for line in shown:
        assert without_places(line) in printed, line


def test_the_examples_run():
    blocks = re.findall(r"```python example\n(.*?)```", PAGE, re.S)
    assert blocks
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(block, {})
        assert "±" in out.getvalue()
