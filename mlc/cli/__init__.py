"""The command line: ``mlc run | plan | explain | inspect | draw | check | bench``."""
