"""Names that other libraries use for the parts of an engine, with what to write instead, for error messages."""

__all__ = ["ENGINE", "RUN"]

ENGINE = {
    "add_event_handler": "write engine.on(event, handler); a handler is called as handler(engine)",
    "add_event_handlers": "write engine.on(event, handler) for each",
    "remove_event_handler": "engine.on(event, handler) gives a handle, whose remove() detaches the handler",
    "has_event_handler": "keep the handle that engine.on(event, handler) gives",
    "attach": (
        "a metric is added by engine.add_metric(metric, name); a handler with an attach() is attached by "
        "handler.attach(engine), any other one by engine.on(event, handler)"
    ),
    "add_callback": "write engine.on(event, handler)",
    "event_filter": "write engine.on(Events.X(filter=function), handler)",
    "max_iters": "write engine.run(data, max_iterations=...)",
    "fit": "write engine.run(data, max_epochs=...)",
    "train": "write engine.run(data, max_epochs=...)",
    "validate": "make a second Engine, an evaluator, and write evaluator.run(data)",
    "test": "make a second Engine, an evaluator, and write evaluator.run(data)",
    "evaluate": "make a second Engine, an evaluator, and write evaluator.run(data)",
    "predict": "make a second Engine, whose step gives the predictions, and write it.run(data)",
    "set_data": "pass the data to engine.run(data)",
    "interrupt": "engine.terminate() leaves the run; a state_dict() goes on from there",
    "current_epoch": "it is engine.state.epoch, from 0",
    "global_step": "it is engine.state.iteration",
}

RUN = {
    "max_iters": "it is called max_iterations=",
    "max_steps": "it is called max_iterations=",
    "epochs": "it is called max_epochs=",
    "num_epochs": "it is called max_epochs=",
    "seed": "seed the generators before, as by torch.manual_seed(seed)",
}
