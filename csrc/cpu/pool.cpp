#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastclip {
namespace {

struct Job {
    Work work;
    void* context;
    int parts;
    std::atomic<int> next{0};

    void help() {
        for (int part; (part = next.fetch_add(1)) < parts;) work(context, part);
    }
    static void help(void* job) { static_cast<Job*>(job)->help(); }
};

// Threads that sleep between jobs. Never destroyed: at exit they may be asleep in it.
class Pool {
public:
    const pid_t process = getpid();

    // False where another thread has its job done.
    bool run(Job& job) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return false;
        std::unique_lock<std::mutex> lock(mutex_);
        try {
            for (; threads_ < job.parts - 1; ++threads_) std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
            // no more threads to be had: those that are there do it
        }
        job_ = &job;
        ++number_;
        lock.unlock();
        wake_.notify_all();
        job.help();
        lock.lock();
        // no thread begins with it any more
        job_ = nullptr;
        done_.wait(lock, [this] { return busy_ == 0; });
        return true;
    }

private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (unsigned long seen = 0;;) {
            wake_.wait(lock, [&] { return job_ && number_ != seen; });
            seen = number_;
            Job* const job = job_;
            ++busy_;
            lock.unlock();
            job->help();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    unsigned long number_ = 0;
    int threads_ = 0, busy_ = 0;
};

// A forked child has no threads but the one that forked, and locks of others stay locked: it
// takes a pool of its own.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load(std::memory_order_acquire);
    while (!found || found->process != getpid()) {
        Pool* const made = new Pool;
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<GompParallel> team{nullptr};
std::atomic<pid_t> team_process{0};

}  // namespace

void run(int parts, Work work, void* context) {
    Job job{work, context, parts};
    if (parts > 1) {
        const GompParallel fork_join = team.load(std::memory_order_relaxed);
        if (fork_join && team_process.load(std::memory_order_relaxed) == getpid())
            // 0: as many threads as torch's own loops have. For fewer the runtime would end some of
            // its threads, and begin them again for the next product.
            fork_join(&Job::help, &job, 0, 0);
        else if (pool().run(job))
            return;
    }
    job.help();
}

void use_team(void* gomp_parallel) {
    team = reinterpret_cast<GompParallel>(gomp_parallel);
    team_process = getpid();
}

}  // namespace fastclip
