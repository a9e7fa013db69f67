"""A small control problem on which the `sampled` objective trains a policy and its gradient's variance is measured.

A point on a line takes `horizon` steps; the student sees its state and which of two mirrored tasks it has (go to
+target, or to -target), and each task has a fixed teacher that heads there at full speed and stays. An action is a
token: the student is a layer of features and a head over discrete actions. The setting follows arXiv 2603.25562, with
discrete actions in place of its continuous ones.

Suffixes: B trajectories, T steps, N = B * T flat tokens, A actions (the vocabulary), H features, M micro-batches,
P parameters. Log-probs in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions, SampledSignal, Tokens

_CHUNK_TOKENS = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """The problem and how long to train on it."""

    iterations: int
    horizon: int = 20  # T
    target: float = 2.0  # of task +1; task -1 has the mirrored one
    num_actions: int = 9  # A, speeds from -1 to 1
    step_size: float = 0.25  # distance at full speed
    start_deviation: float = 0.3
    state_noise: float = 0.05  # standard deviation per step
    teacher_width: float = 0.35  # standard deviation of the teacher's speeds around its best one
    num_features: int = 32  # H
    num_micro_batches: int = 8  # M
    micro_batch_trajectories: int = 64
    learning_rate: float = 0.01  # of Adam, which makes the size of a gradient no matter
    evaluation_trajectories: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Weights of the student: logits = head tanh(input_weight (state / target, task) + bias)."""

    input_H2: Tensor
    bias_H: Tensor
    head_AH: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.input_H2, self.bias_H, self.head_AH


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Sampled trajectories, laid end to end."""

    inputs_N2: Tensor
    actions_N: Tensor  # int64
    sampler_logprobs_N: Tensor
    teacher_logprobs_N: Tensor
    token_kl: float  # mean over tokens of the exact KL(p || q) at their states
    final_distance: float  # mean |state - target| after the last step


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRun:
    """What was measured while training with one discount; one entry per iteration in the tuples."""

    variance: tuple[float, ...]  # trace of the micro-batch gradients' sample covariance
    noise: tuple[float, ...]  # the same over the squared norm of the mean gradient; about M when there is no signal
    token_kl: tuple[float, ...]
    final_distance: float  # of fresh trajectories after training
    final_token_kl: float


def initial_policy(settings: ControlSettings, *, generator: torch.Generator) -> Policy:
    """Return random features under a head of zeros: every action equally likely."""
    return Policy(
        input_H2=torch.randn(settings.num_features, 2, generator=generator).requires_grad_(),
        bias_H=torch.randn(settings.num_features, generator=generator).requires_grad_(),
        head_AH=torch.zeros(settings.num_actions, settings.num_features).requires_grad_(),
    )


def features(policy: Policy, inputs_N2: Tensor) -> Tensor:
    """Return the states [N,H] that the head reads."""
    return torch.tanh(inputs_N2 @ policy.input_H2.T + policy.bias_H)


def student_log_p(policy: Policy, inputs_N2: Tensor) -> Tensor:
    """Return the policy's log-probs [N,A], detached."""
    with torch.no_grad():
        return (features(policy, inputs_N2) @ policy.head_AH.T).log_softmax(-1)


def teacher_log_q(states_B: Tensor, *, tasks_B: Tensor, settings: ControlSettings) -> Tensor:
    """Return the log-probs [B,A] of each task's teacher: a normal around its best speed, on the student's actions."""
    best_B = ((tasks_B * settings.target - states_B) / settings.step_size).clamp(-1, 1)
    deviation_BA = (speeds(settings) - best_B[:, None]) / settings.teacher_width
    return (-deviation_BA.square() / 2).log_softmax(-1)


def speeds(settings: ControlSettings) -> Tensor:
    """Return the speed of each action [A]."""
    return torch.linspace(-1, 1, settings.num_actions)


def roll_out(
    policy: Policy | None, settings: ControlSettings, *, num_trajectories: int, generator: torch.Generator
) -> Rollout:
    """Sample trajectories of the policy, of the teachers when None; the tasks alternate."""
    tasks_B = 1.0 - 2.0 * (torch.arange(num_trajectories) % 2)
    states_B = settings.start_deviation * torch.randn(num_trajectories, generator=generator)
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(settings.horizon):
        inputs_B2 = torch.stack([states_B / settings.target, tasks_B], dim=-1)
        log_q_BA = teacher_log_q(states_B, tasks_B=tasks_B, settings=settings)
        log_p_BA = log_q_BA if policy is None else student_log_p(policy, inputs_B2)
        actions_B1 = torch.multinomial(log_p_BA.exp(), 1, generator=generator)
        kl_B = (log_p_BA.exp() * (log_p_BA - log_q_BA)).sum(-1)
        steps.append((inputs_B2, actions_B1, log_p_BA.gather(1, actions_B1), log_q_BA.gather(1, actions_B1), kl_B))
        noise_B = torch.randn(num_trajectories, generator=generator)
        moves_B = settings.step_size * speeds(settings)[actions_B1.squeeze(1)]
        states_B = states_B + moves_B + settings.state_noise * noise_B
    inputs_BT2, actions_BT1, log_p_BT1, log_q_BT1, kl_BT = (
        torch.stack(column, dim=1) for column in zip(*steps, strict=True)
    )
    return Rollout(
        inputs_N2=inputs_BT2.flatten(0, 1),
        actions_N=actions_BT1.flatten(),
        sampler_logprobs_N=log_p_BT1.flatten(),
        teacher_logprobs_N=log_q_BT1.flatten(),
        token_kl=float(kl_BT.mean()),
        final_distance=float((states_B - tasks_B * settings.target).abs().mean()),
    )


def micro_batch_gradients(policy: Policy, rollout: Rollout, *, settings: ControlSettings, discount: float) -> Tensor:
    """Return the gradient [M,P] of each micro-batch's mean over trajectories, by the `sampled` objective."""
    num_tokens = settings.micro_batch_trajectories * settings.horizon
    gradients = [
        _gradient(policy, rollout, rows=slice(start, start + num_tokens), settings=settings, discount=discount)
        for start in range(0, len(rollout.actions_N), num_tokens)
    ]
    return torch.stack(gradients)


def _gradient(policy: Policy, rollout: Rollout, *, rows: slice, settings: ControlSettings, discount: float) -> Tensor:
    actions_N, log_p_N = rollout.actions_N[rows], rollout.sampler_logprobs_N[rows]
    losses = OBJECTIVES["sampled"].losses(
        features(policy, rollout.inputs_N2[rows]),
        policy.head_AH,
        tokens=Tokens(
            ids_N=actions_N,
            offsets=torch.arange(0, len(actions_N) + 1, settings.horizon),
            mask_N=torch.ones_like(actions_N, dtype=torch.bool),
            weights_N=torch.full_like(log_p_N, 1 / settings.micro_batch_trajectories),
            sampler_logprobs_N=log_p_N,
            advantages_N=torch.zeros_like(log_p_N),
        ),
        signal=SampledSignal(logprobs_N=rollout.teacher_logprobs_N[rows]),
        options=ObjectiveOptions(policy=PolicyOptions(discount=discount), chunk_tokens=_CHUNK_TOKENS),
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.loss, policy.parameters)])


def train(settings: ControlSettings, *, discount: float, seed: int) -> ControlRun:
    """Train a fresh policy by the mean of the micro-batch gradients; the seed fixes it and all random numbers."""
    generator = torch.Generator().manual_seed(seed)
    policy = initial_policy(settings, generator=generator)
    optimizer = torch.optim.Adam(policy.parameters, lr=settings.learning_rate)
    num_trajectories = settings.num_micro_batches * settings.micro_batch_trajectories
    variances, noises, token_kls = [], [], []
    for _ in range(settings.iterations):
        rollout = roll_out(policy, settings, num_trajectories=num_trajectories, generator=generator)
        gradients_MP = micro_batch_gradients(policy, rollout, settings=settings, discount=discount)
        mean_P = gradients_MP.mean(0)
        _step(optimizer, policy.parameters, gradient_P=mean_P)
        variances.append(float(gradients_MP.var(0).sum()))
        noises.append(variances[-1] / float(mean_P.square().sum()))
        token_kls.append(rollout.token_kl)
    final = roll_out(policy, settings, num_trajectories=settings.evaluation_trajectories, generator=generator)
    return ControlRun(
        variance=tuple(variances),
        noise=tuple(noises),
        token_kl=tuple(token_kls),
        final_distance=final.final_distance,
        final_token_kl=final.token_kl,
    )


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], *, gradient_P: Tensor) -> None:
    parts = gradient_P.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer.step()
