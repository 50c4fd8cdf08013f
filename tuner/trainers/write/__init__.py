"""A measured configuration in the words of other people's trainers, one file per trainer.

Each has `decided(params)`, what the tuner chose, as that trainer's settings; `settings(setting)`, all that
made the measurement; and `render(setting)`, the file or the command. What a trainer can't do is said in a
comment. `tuner.trainers.write.registry` knows them by name.
"""
