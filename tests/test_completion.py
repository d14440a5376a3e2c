"""What a shell offers after diffrl's completion script."""

import subprocess

import pytest

from diffrl.cli import main


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["do"], ["doctor"]),
        (["train", "algo=d"], ["algo=ddpo"]),
        (["train", "algo=ddpo", "guidance=s"], ["guidance=smc", "guidance=svdd"]),
        (["doctor", "+experiment=rwr_s"], ["+experiment=rwr_sparse_paper"]),
        (["eval", "--control"], ["--control-scale"]),
        (["train", "algo.learning_r"], ["algo.learning_rate="]),
        (["plan", "eval_p"], ["eval_prompts=", "eval_pictures="]),
        (["list", "algo="], []),
    ],
)
def test_bash_completes_commands_options_and_choices(words, offered, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    typed = f"COMP_WORDS=(diffrl {' '.join(words)}); COMP_CWORD={len(words)}; _diffrl 2> /dev/null"
    said = 'printf "%s\\n" "${COMPREPLY[@]}"; [[ $COMP_WORDBREAKS != *=* ]] && echo whole words'
    code = f"{script}\n{typed}\n{said}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [*(offered or [""]), "whole words", ""]


def test_zsh_has_a_script_too(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert "algo=ddpo" in script
    assert script.splitlines()[-1] == "compdef _shtab_diffrl diffrl"
