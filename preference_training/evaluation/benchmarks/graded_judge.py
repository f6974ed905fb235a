"""Language models that say which of two responses is better, and whether it is much better: Arena-Hard-Auto's five verdicts."""

from preference_training.configuration.sections import EvaluationConfig
from preference_training.evaluation.judges import ChatJudge, question_code, read_coded
from preference_training.generation.servers import OllamaServer, OpenAIServer

VERDICTS = {"A>>B": "first much", "A>B": "first", "A=B": "tie", "B>A": "second", "B>>A": "second much"}


class GradedJudge(ChatJudge):
    """A language model behind HTTP that gives one of five verdicts."""

    prompt_file = "graded_judge_prompt.txt"

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of those in OUTCOMES."""
        code = question_code(prompt, first, second)
        return self.answer(self.request(prompt, first, second), lambda text: parse_grade(text, code))


class OpenAIGradedJudge(GradedJudge):
    """A model behind the OpenAI protocol."""

    server_class = OpenAIServer


class OllamaGradedJudge(GradedJudge):
    """A model behind the protocol of Ollama."""

    server_class = OllamaServer


def parse_grade(reply: str, code: str) -> str:
    """The verdict in a judge's reply. Raises ValueError without one."""
    found, _ = read_coded(reply, code)
    better = str(found.get("better")).replace(" ", "")
    if better not in VERDICTS:
        raise ValueError("no verdict")
    return VERDICTS[better]


def build_graded_judge(options: EvaluationConfig) -> GradedJudge | None:
    """The judge that a configuration names, where it can give five verdicts; else None."""
    kind, _, model = (options.judge or "").partition(":")
    classes = {"openai": OpenAIGradedJudge, "ollama": OllamaGradedJudge}
    return classes[kind](kind, model, options) if kind in classes else None
