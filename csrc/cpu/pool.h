// Parts of one piece of work, side by side.
#pragma once

namespace fastclip {

using Work = void (*)(void* context, int part);

// work(context, part) for every part in [0, parts), by this thread and others. Which thread does
// which part is open, so a part must not care. Any thread may call, also after a fork.
void run(int parts, Work work, void* context);

template <class Function>
void run(int parts, Function&& function) {
    run(parts, [](void* context, int part) { (*static_cast<Function*>(context))(part); },
        &function);
}

// Use the threads of an OpenMP runtime that is in the process already, given by the address of
// its GOMP_parallel: its threads wait for work by spinning, and ours would have to share the
// processors with them. Null: threads of our own.
void use_team(void* gomp_parallel);

}  // namespace fastclip
