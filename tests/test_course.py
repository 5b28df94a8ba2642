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
        ("(z[0] * z[1])", "(z[0].detach() * z[1].detach())", "by z2: off by "),
        ("log_sums.mean() - positives.mean()", "2 * (log_sums.mean() - positives.mean())",
         "2.000 times what is expected: a mean and not a sum, or the sign?"),
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
        ("(squares - variances.square().sum())", "squares", "covariance: off by "),
        ("F.mse_loss(z1, z2)", "F.l1_loss(z1, z2)", "invariance: "),
        ("(variances + 1e-4)", "variances", "has no gradient at 0: add 1e-4"),
        ("(2 * squares - squares.detach())", "squares", "its gradient, by x: off by "),
        ("sim_coeff * invariance", "25.0 * invariance", "the loss with coefficients 2, 3 and 4: "),
        ("sim_coeff=25.0", "sim_coeff=1.0", "the loss is 25 invariance + 25 variance"),
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
         "plain targets: loss = cross_entropy + 5 me_max: off by"),
        (" - prior.log().to(mean_p)", "", "me_max: "),
        ("mean_p.clamp(min=tiny)", "mean_p", "0 log 0 is 0"),
        ("        if sinkhorn:\n", "        if not sinkhorn:\n", "sinkhorn targets: cross_entropy"),
        ("anchors, prototypes, temperature)", "anchors, prototypes, 0.1)", "temperature 0.2"),
        ("F.normalize(prototypes, dim=1)", "F.normalize(prototypes.bfloat16(), dim=1).float()",
         "of bfloat16"),
    ],
    "msn.sinkhorn_balance": [
        ("prior, rounds=3", "prior, rounds=2", "three rounds to the uniform prior: "),
    ],
    "msn.schedule": [
        ("now = step + 1", "now = step", "lr of a run of 35 updates: one update late"),
    ],
    "pmsn.pmsn_loss": [
        ("kl = (mean_p * log_ratio).sum()", "kl = -(prior * log_ratio).sum()",
         "exponent 1: kl: the reversed divergence, KL(prior || mean)"),
    ],
    "mae.MAE.forward": [
        ("(inverse >= kept)", "(order >= kept)", "order and its inverse are exchanged"),
    ],
    "mae.mae_loss": [
        ("(error * mask).sum() / mask.sum()", "error.mean()",
         "the loss, norm_pix_loss=False: all patches count"),
    ],
    "data2vec.block_mask": [
        ("<= room:", "< 99:", "refuse a block without room"),
    ],
    "data2vec.data2vec_targets": [
        ("return F.layer_norm(mean, mean.shape[2:])", "return mean",
         "the mean of the layers is not normalised"),
    ],
    "data2vec.data2vec_loss": [
        (", beta=beta)", ")", "beta is ignored"),
    ],
    "sampler.KClassBatchSampler": [
        ("self.dealt + self.rng.random(len(self.dealt))", "self.rng.random(len(self.dealt))",
         "deal the least dealt classes first"),
    ],
    "sampler.power_law_prior": [
        ("return weights / weights.sum()", "return weights", "divide by their sum"),
    ],
}  # fmt: skip
