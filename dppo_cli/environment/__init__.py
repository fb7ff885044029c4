"""What answers the model between its turns: nothing, a function of the user, or tools."""
