import json

import pytest

from distopt.bench import convergence
from distopt.communicators import launcher
from distopt.errors import DistoptError


def test_the_largest_difference_is_relative_and_step_by_step():
    curves = {1: [2.0, 4.0], 2: [2.0, 4.4], 3: [1.9, 4.0]}
    assert convergence.largest_difference(curves) == pytest.approx(0.1)
    assert convergence.largest_difference({1: [2.0]}) == 0.0


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="needs a seed"):
        convergence.Options(seeds=())
    with pytest.raises(ValueError, match="at least 1"):
        convergence.Options(steps=0)


def test_a_training_that_fails_is_reported_with_its_output(tmp_path):
    if launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    options = convergence.Options(seeds=(0,), steps=1, global_batch=1, curves=(), data_dir=str(tmp_path))
    with pytest.raises(DistoptError, match="on 2 ranks with seed 0 ended with exit code"):
        convergence.run(options)


@pytest.mark.slow
def test_losses_on_real_images_agree_over_50_steps_on_1_to_4_ranks(real_cifar10, tmp_path):
    if launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    # 67 is odd and no multiple of 2, 3 or 4: every shard is uneven.
    options = convergence.Options(
        seeds=(0,),
        steps=1,
        global_batch=67,
        curve_learning_rates=(0.03,),
        data_dir=str(real_cifar10),
        timeout_seconds=200,
    )
    convergence.main(options, str(tmp_path / "c.json"))
    result = json.loads((tmp_path / "c.json").read_text())
    curves = result["curves"]["0.03"]
    assert {ranks: len(losses) for ranks, losses in curves.items()} == dict.fromkeys("1234", 50)
    assert 0 <= result["largest_relative_difference"]["0.03"] < 1e-4
    assert curves["1"][-1] < curves["1"][0]
